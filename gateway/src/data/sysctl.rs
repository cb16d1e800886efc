//! The kernel's limits for socket buffers (cli-and-service.md section 11).
//!
//! The data sockets force their sizes past these limits where they may; without that right the limits decide, so
//! they are raised at start-up. Only upwards, and never an error.

use std::{fs, path::Path};

/// Raises `net.core.rmem_max` and `net.core.wmem_max` to what the data sockets ask for.
pub fn raise_buffer_limits() {
    raise(Path::new("/proc/sys/net/core/rmem_max"), super::udp::RECV_BUFFER);
    raise(Path::new("/proc/sys/net/core/wmem_max"), super::udp::SEND_BUFFER);
}

fn raise(file: &Path, wanted: usize) {
    let shown = file.display();
    match fs::read_to_string(file).map(|text| text.trim().parse::<usize>()) {
        Ok(Ok(current)) if current >= wanted => {
            tracing::info!("{shown} is {current} already");
        }
        // A network namespace of its own may not show the file; the limit is then the host's.
        Err(e) => tracing::info!("{shown} stays as it is: {e}"),
        Ok(_) => match fs::write(file, wanted.to_string()) {
            Ok(()) => tracing::info!("{shown} raised to {wanted}"),
            Err(e) => tracing::info!("{shown} stays as it is: {e}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_raised_and_never_lowered() {
        let table = [
            ("212992\n", "1000000"),
            ("1000000", "1000000"),
            ("2000000\n", "2000000\n"),
            ("junk", "1000000"),
        ];
        for (before, after) in table {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("rmem_max");
            fs::write(&file, before).unwrap();
            raise(&file, 1_000_000);
            assert_eq!(fs::read_to_string(&file).unwrap(), after, "from {before:?}");
        }
    }

    #[test]
    fn missing_file_is_no_error() {
        raise(Path::new("/proc/sys/net/core/no_such_limit"), 1);
    }
}
