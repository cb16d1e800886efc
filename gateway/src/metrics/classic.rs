//! The page for those that do not ask for OpenMetrics: Prometheus' text format 0.0.4.
//!
//! Samples are written the same. What describes them is not: there the family of a counter has its `_total` in the name,
//! an info is a gauge, and there are neither units nor an end.

/// Turns a page of ours into the older format.
pub fn from_open_metrics(page: &str) -> String {
    let mut classic = String::with_capacity(page.len());
    let mut help = None;
    for line in page.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), text) => help = Some((name, text.unwrap_or_default())),
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    other => ("", other),
                };
                if let Some((_, text)) = help.take_if(|(of, _)| *of == name) {
                    classic.extend(["# HELP ", name, suffix, " ", text, "\n"]);
                }
                classic.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
            }
            (Some("#"), ..) => {}
            _ => classic.extend([line, "\n"]),
        }
    }
    classic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_infos_get_their_suffix_and_the_rest_stays() {
        let page = "\
# HELP a_seconds What a is.
# TYPE a_seconds counter
# UNIT a_seconds seconds
a_seconds_total{x=\"# HELP\"} 1.5
# HELP b Which b.
# TYPE b info
b_info{version=\"1\"} 1
# HELP c c.
# TYPE c gauge
c 3
# TYPE d histogram
d_sum 1.0
d_count 1
d_bucket{le=\"+Inf\"} 1
# EOF
";
        let expect = "\
# HELP a_seconds_total What a is.
# TYPE a_seconds_total counter
a_seconds_total{x=\"# HELP\"} 1.5
# HELP b_info Which b.
# TYPE b_info gauge
b_info{version=\"1\"} 1
# HELP c c.
# TYPE c gauge
c 3
# TYPE d histogram
d_sum 1.0
d_count 1
d_bucket{le=\"+Inf\"} 1
";
        assert_eq!(from_open_metrics(page), expect);
    }
}
