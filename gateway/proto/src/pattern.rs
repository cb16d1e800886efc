//! The address of a DNS resource: a glob over the labels of a name (dns.md section 5.4). Knows names, no resource.
//!
//! ```text
//! pattern:  label . label . ** . label      `**` stands for any number of labels,
//! label:    a  ?  *  [a-z]                  `*` for any number of characters of one label
//! ```
//!
//! Both levels are the same game, one element that stands for many and others that stand for one, and so have the same
//! [`matches_all`]: its work is at most pattern times name, whatever the pattern.

use std::iter::Peekable;

use crate::names::DomainName;

/// What a resource's address says about names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    labels: Vec<Label>,
    /// What follows a leading `*.`: it matches too, letter by letter.
    bare: Option<Box<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Label {
    /// `**`
    Many,
    One(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// `*`
    Many,
    /// `?`
    Any,
    /// Anything that is nothing else here.
    Is(char),
    /// `[abc]`, or `[!abc]` with `but`: ranges, both ends included.
    Among { ranges: Vec<(char, char)>, but: bool },
}

impl Pattern {
    /// Reads a pattern, in any case and with or without a dot at its end. `None` if it can match no name: a label is
    /// empty, `**` is not all of its label, or a `[` is not closed.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let mut labels = Vec::new();
        let mut rest = text.chars().peekable();
        loop {
            labels.push(Label::read(&mut rest)?);
            // The dot between two labels.
            if rest.next().is_none() {
                break;
            }
        }
        let bare = text.strip_prefix("*.").map(Into::into);
        Some(Self { labels, bare })
    }

    /// Does the pattern mean this name?
    #[must_use]
    pub fn matches(&self, name: &DomainName) -> bool {
        let name = name.as_str();
        let labels: Vec<&str> = name.split('.').collect();
        self.bare.as_deref() == Some(name)
            || matches_all(&self.labels, &labels, |label| *label == Label::Many, Label::matches)
    }
}

impl Label {
    /// Up to a dot or the end; the dot is left.
    fn read(rest: &mut Peekable<impl Iterator<Item = char>>) -> Option<Self> {
        let mut pieces = Vec::new();
        while let Some(c) = rest.next_if(|c| *c != '.') {
            pieces.push(match c {
                '*' => Piece::Many,
                '?' => Piece::Any,
                '[' => Piece::read_class(rest)?,
                c => Piece::Is(c),
            });
        }
        match &pieces[..] {
            [] => None,
            [Piece::Many, Piece::Many] => Some(Self::Many),
            pieces if pieces.windows(2).any(|two| two == [Piece::Many, Piece::Many]) => None,
            _ => Some(Self::One(pieces)),
        }
    }

    fn matches(&self, label: &&str) -> bool {
        match self {
            Self::Many => true,
            Self::One(pieces) => {
                matches_all(pieces, label.as_bytes(), |piece| *piece == Piece::Many, Piece::matches)
            }
        }
    }
}

impl Piece {
    /// What follows `[`, as in glob(7): a `]` in the first place is one of the characters, and so is a `-` at an end.
    fn read_class(rest: &mut Peekable<impl Iterator<Item = char>>) -> Option<Self> {
        let but = rest.next_if_eq(&'!').is_some();
        let mut ranges = Vec::new();
        loop {
            let first = rest.next()?;
            if first == ']' && !ranges.is_empty() {
                return Some(Self::Among { ranges, but });
            }
            if rest.next_if_eq(&'-').is_none() {
                ranges.push((first, first));
            } else if rest.peek() == Some(&']') {
                ranges.extend([(first, first), ('-', '-')]);
            } else {
                ranges.push((first, rest.next()?));
            }
        }
    }

    /// A byte is a character: names are ASCII.
    fn matches(&self, byte: &u8) -> bool {
        let c = char::from(*byte);
        match self {
            Self::Many | Self::Any => true,
            Self::Is(own) => *own == c,
            Self::Among { ranges, but } => {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&c)) != *but
            }
        }
    }
}

/// Do the `items` match the `pattern`, all of both? An element that `is_many` stands for any number of items; of the
/// others each stands for one that `fits`. Only the last of the many is ever tried again with one item more: what an
/// earlier one could take in its stead, it can take itself.
fn matches_all<P, T>(
    pattern: &[P],
    items: &[T],
    is_many: impl Fn(&P) -> bool,
    fits: impl Fn(&P, &T) -> bool,
) -> bool {
    let (mut p, mut i) = (0, 0);
    // Where to go on if what follows does not fit: behind the last of the many, and the first item it has not taken.
    let mut again: Option<(usize, usize)> = None;
    while i < items.len() {
        match pattern.get(p) {
            Some(element) if is_many(element) => {
                p += 1;
                again = Some((p, i));
            }
            Some(element) if fits(element, &items[i]) => {
                p += 1;
                i += 1;
            }
            _ => {
                let Some((behind, untaken)) = again else { return false };
                (p, i) = (behind, untaken + 1);
                again = Some((p, i));
            }
        }
    }
    pattern[p..].iter().all(is_many)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};

    use super::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    #[test]
    fn patterns_mean_what_the_spec_says() {
        let table: [(&str, &[&str], &[&str]); 28] = [
            // The table of dns.md section 5.4.
            ("example.net", &["example.net"], &["a.example.net", "net", "example.net.net"]),
            ("*.example.net", &["a.example.net", "example.net"], &["b.a.example.net", "xexample.net"]),
            (
                "**.example.net",
                &["a.example.net", "b.a.example.net", "example.net", "d.c.b.a.example.net"],
                &["xexample.net", "example.net.x", "net"],
            ),
            ("?.example.net", &["a.example.net"], &["ab.example.net", "example.net"]),
            ("a*.example.net", &["a.example.net", "ab.example.net"], &["ba.example.net", "example.net"]),
            // Any case, a dot at the end.
            ("*.Example.NET", &["a.example.net", "A.EXAMPLE.net", "example.net"], &["b.a.example.net"]),
            ("example.net.", &["example.net"], &["example.net.x"]),
            // One label and many, elsewhere.
            ("*", &["a", "localhost"], &["a.b"]),
            ("**", &["a", "a.b", "a.b.c.d"], &[]),
            ("a.**.net", &["a.net", "a.b.net", "a.b.c.net"], &["a", "net", "b.net", "ab.net", "a.b.nets"]),
            ("a.**", &["a", "a.b", "a.b.c"], &["b.a", "ab"]),
            ("**.a.**", &["a", "x.a", "a.x", "x.a.x"], &["x", "ab.x"]),
            ("**.**", &["a", "a.b"], &[]),
            ("**.*.net", &["a.net", "b.a.net"], &["net"]),
            ("a.*.net", &["a.b.net"], &["a.net", "a.b.c.net"]),
            ("*a*b*", &["ab", "xaxbx", "aabb"], &["ba", "a.b"]),
            ("a?c.net", &["abc.net", "a-c.net"], &["ac.net", "abbc.net", "a.c.net"]),
            ("a.b*", &["a.b", "a.bc"], &["ab", "a.c.b"]),
            // The bare remainder is text, no pattern.
            ("*.*.net", &["a.b.net", "*.net"], &["a.net", "net"]),
            // Classes.
            ("[abc].net", &["a.net", "c.net"], &["d.net", "ab.net", "net"]),
            ("[!a-c].net", &["d.net", "1.net"], &["a.net", "b.net", "de.net"]),
            ("[A-C]1.net", &["b1.net"], &["d1.net"]),
            ("[]a].net", &["].net", "a.net"], &["b.net"]),
            ("[!]].net", &["a.net"], &["].net"]),
            ("[a-]x[-a].net", &["ax-.net", "-xa.net"], &["bxa.net", "axb.net"]),
            ("[a.b]c.net", &["ac.net", "bc.net"], &["a.bc.net", "c.net"]),
            ("[z-a].net", &[], &["a.net", "z.net", "m.net"]),
            ("b\u{fc}cher[!\u{fc}].net", &[], &["bucher.net"]),
        ];
        for (text, yes, no) in table {
            let pattern = Pattern::new(text).unwrap_or_else(|| panic!("{text}"));
            for (names, expect) in [(yes, true), (no, false)] {
                names.iter().for_each(|n| assert_eq!(pattern.matches(&name(n)), expect, "{text} and {n}"));
            }
        }
    }

    #[test]
    fn what_can_match_nothing_is_no_pattern() {
        let invalid = "a**b **a.net a**.net *** a.***.net ** *. .. . .a a..b a.. *.. [ [a [! [!a [] [!] [a- a.[b.net [a-].[";
        let (none, some): (Vec<&str>, Vec<&str>) =
            invalid.split(' ').partition(|text| Pattern::new(text).is_none());
        assert_eq!(some, ["**", "*."], "of {none:?}");
        assert_eq!(Pattern::new(""), None);
    }

    /// As the spec tells it: each `*` tries every length, each `**` every number of labels.
    fn naive(pattern: &str, name: &str) -> bool {
        fn label(pattern: &[u8], text: &[u8]) -> bool {
            match (pattern, text) {
                ([], []) => true,
                ([b'*', behind @ ..], _) => (0..=text.len()).any(|n| label(behind, &text[n..])),
                ([b'[', b'!', c, b']', behind @ ..], [own, rest @ ..]) => c != own && label(behind, rest),
                ([b'[', c, d, b']', behind @ ..], [own, rest @ ..]) => {
                    (c == own || d == own) && label(behind, rest)
                }
                ([c, behind @ ..], [own, rest @ ..]) => (*c == b'?' || c == own) && label(behind, rest),
                _ => false,
            }
        }
        fn labels(pattern: &[&str], name: &[&str]) -> bool {
            match (pattern, name) {
                ([], []) => true,
                (["**", behind @ ..], _) => (0..=name.len()).any(|n| labels(behind, &name[n..])),
                ([first, behind @ ..], [own, rest @ ..]) => {
                    label(first.as_bytes(), own.as_bytes()) && labels(behind, rest)
                }
                _ => false,
            }
        }
        let (p, n): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), name.split('.').collect());
        labels(&p, &n) || pattern.strip_prefix("*.") == Some(name)
    }

    #[test]
    fn it_equals_a_matcher_that_tries_everything() {
        let mut rng = SmallRng::seed_from_u64(54);
        let mut matched = 0;
        for _ in 0..80_000 {
            let labels: Vec<String> = (0..rng.random_range(1..=4))
                .map(|_| {
                    if rng.random_ratio(1, 4) {
                        return "**".into();
                    }
                    let pieces = ["a", "b", "?", "[ab]", "[!a]", "*"];
                    let mut label = String::new();
                    for _ in 0..rng.random_range(1..=4) {
                        let piece = pieces.choose(&mut rng).expect("not empty");
                        if !(*piece == "*" && label.ends_with('*')) {
                            label.push_str(piece);
                        }
                    }
                    label
                })
                .collect();
            let text = labels.join(".");
            let mut domain: String = (0..rng.random_range(1..=10))
                .map(|_| *['a', 'b', 'c', '.'].choose(&mut rng).expect("not empty"))
                .collect();
            domain = domain.split('.').filter(|label| !label.is_empty()).collect::<Vec<_>>().join(".");
            if domain.is_empty() {
                continue;
            }
            let got = Pattern::new(&text).expect("valid").matches(&name(&domain));
            assert_eq!(got, naive(&text, &domain), "{text} and {domain}");
            matched += u32::from(got);
        }
        assert!((4_000..76_000).contains(&matched), "both happen: {matched}");
    }

    #[test]
    fn no_pattern_is_slow() {
        let label = "a".repeat(63);
        let longest = name(&[&label[..], &label, &label, &label[..61]].join("."));
        let many_labels = name(&vec!["a"; 127].join("."));
        // Trying everything would take longer than anybody waits.
        for (text, domain) in [
            ("a*".repeat(200) + "b", &longest),
            (format!("{}b.**", "*a".repeat(200)), &longest),
            (format!("{}b", "**.".repeat(200)), &many_labels),
            (format!("{}b", "**.*a*.".repeat(60)), &many_labels),
            (format!("{}b", "**.*a*a*a*.".repeat(200)), &longest),
        ] {
            assert!(!Pattern::new(&text).expect("valid").matches(domain), "{text}");
        }
        let compared = Cell::new(0);
        let fits = |own: &char, item: &char| {
            compared.set(compared.get() + 1);
            own == item
        };
        for pattern in ["a*".repeat(200), "*a".repeat(200), "*aaaaaaaaa".repeat(40), "*".repeat(400)] {
            let pattern: Vec<char> = format!("{pattern}b").chars().collect();
            let items = vec!['a'; 1000];
            compared.set(0);
            assert!(!matches_all(&pattern, &items, |c| *c == '*', fits));
            let most = pattern.len() * items.len();
            assert!(compared.get() > 0 && compared.get() <= most, "{}", compared.get());
        }
    }
}
