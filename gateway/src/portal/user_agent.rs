//! Who we say we are (portal-protocol.md section 3): `Debian/12.0.0 gateway/1.6.1 (x86_64; 6.1.0-31-amd64)`.

/// The user agent of this machine, with `version` as the gateway's.
pub fn user_agent(version: &str) -> String {
    let os_release = ["/etc/os-release", "/usr/lib/os-release"];
    let os_release =
        os_release.iter().find_map(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    let kernel = rustix::system::uname();
    build(&os_release, version, std::env::consts::ARCH, &kernel.release().to_string_lossy())
}

fn build(os_release: &str, version: &str, arch: &str, kernel: &str) -> String {
    let member = |name: &str| {
        let line = os_release.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
        line.map(|value| value.trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
    };
    // "Debian GNU/Linux" without its second half: a slash ends the name.
    let name = member("NAME").unwrap_or_else(|| "Linux".to_owned());
    let name = name.split(" GNU/").next().unwrap_or_default().replace('/', "-");
    let os = match member("VERSION_ID").and_then(|id| three_numbers(&id)) {
        Some(version) => format!("{name}/{version}"),
        None => format!("{name}/unknown"),
    };
    let members: Vec<_> = [arch, kernel].into_iter().filter(|member| !member.is_empty()).collect();
    let machine = if members.is_empty() { String::new() } else { format!(" ({})", members.join("; ")) };
    let all = format!("{os} gateway/{version}{machine}");
    // "non-ASCII characters removed"; neither do control characters belong into a header.
    all.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').collect()
}

/// `24.04` is `24.4.0`: numbers, as semantic versions have them.
fn three_numbers(id: &str) -> Option<String> {
    let mut numbers = [0_u32; 3];
    for (number, part) in numbers.iter_mut().zip(id.split('.')) {
        *number = part.parse().ok()?;
    }
    Some(format!("{}.{}.{}", numbers[0], numbers[1], numbers[2]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_agent_has_the_portal_s_shape_on_every_system() {
        let debian =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\n";
        for (os_release, arch, kernel, expect) in [
            (debian, "x86_64", "6.18.44-fc-v669", "Debian/12.0.0 gateway/1.6.1 (x86_64; 6.18.44-fc-v669)"),
            ("NAME=Ubuntu\nVERSION_ID='24.04'", "x86_64", "6.8", "Ubuntu/24.4.0 gateway/1.6.1 (x86_64; 6.8)"),
            ("NAME=\"Arch Linux\"\n", "", "6.9", "Arch Linux/unknown gateway/1.6.1 (6.9)"),
            ("NAME=\"Büro\u{7}\"\nVERSION_ID=x", "", "", "Bro/unknown gateway/1.6.1"),
            ("", "aarch64", "", "Linux/unknown gateway/1.6.1 (aarch64)"),
        ] {
            assert_eq!(build(os_release, "1.6.1", arch, kernel), expect);
        }
    }

    #[test]
    fn a_word_of_it_is_a_version_the_portal_accepts() {
        let agent = user_agent(super::super::COMPAT_VERSION);
        let version = agent.split(' ').find_map(|word| word.strip_prefix("gateway/")).unwrap();
        let numbers: Vec<u32> = version.split('.').map(|n| n.parse().unwrap()).collect();
        // Section 10: clients at HEAD are 1.5.x.
        assert!(numbers[0] == 1 && (4..7).contains(&numbers[1]) && numbers.len() == 3, "{agent}");
    }
}
