//! `top`: live rates per client and per worker. What is shown is computed in [`View`], from two looks at the gateway; how
//! it is drawn is below it, and the last part is the terminal.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Cell, Paragraph, Row, Table},
};
use serde_json::Value;

use super::{
    client::Client as Connection,
    show::{age, bytes},
    status::{Client, FastPath, Status, Volume},
};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How soon a key is heard.
const KEYS: Duration = Duration::from_millis(100);
/// A worker is marked that sleeps less than this.
const SATURATED: f64 = 0.9;

/// By what clients are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Rate,
    Total,
    Handshake,
    Id,
}

impl Sort {
    const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Total,
            Self::Total => Self::Handshake,
            Self::Handshake => Self::Id,
            Self::Id => Self::Rate,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Total => "total",
            Self::Handshake => "handshake",
            Self::Id => "id",
        }
    }
}

/// Bytes a second: outbound, inbound.
type Rate = [f64; 2];

/// What is shown.
#[derive(Debug)]
struct View {
    status: Option<Status>,
    /// When it was so.
    at: Option<Instant>,
    clients: HashMap<String, Rate>,
    workers: Vec<Rate>,
    /// Packets a second, by reason.
    drops: BTreeMap<String, f64>,
    /// Why there is nothing newer.
    trouble: Option<String>,
    sort: Sort,
    reverse: bool,
    /// The first client shown.
    first: usize,
    colour: bool,
}

impl View {
    fn new(colour: bool) -> Self {
        Self {
            status: None,
            at: None,
            clients: HashMap::new(),
            workers: Vec::new(),
            drops: BTreeMap::new(),
            trouble: None,
            sort: Sort::Rate,
            reverse: false,
            first: 0,
            colour,
        }
    }

    /// The gateway was so at `at`, or did not say.
    fn on_look(&mut self, look: Result<Status, String>, at: Instant) {
        let status = match look {
            Ok(status) => status,
            Err(why) => {
                self.trouble = Some(why);
                return;
            }
        };
        self.trouble = None;
        // Another process counts from zero.
        let before = self.status.as_ref().filter(|before| before.pid == status.pid);
        let passed = self.at.map_or(0.0, |before| at.saturating_duration_since(before).as_secs_f64());
        let rates = |before: Option<(Volume, Volume)>, now: (Volume, Volume)| match before {
            Some(before) if passed > 0.0 => {
                [rate(before.0.bytes, now.0.bytes, passed), rate(before.1.bytes, now.1.bytes, passed)]
            }
            _ => [0.0; 2],
        };
        let known: HashMap<&str, &Client> = before
            .map(|before| before.clients.iter().map(|client| (client.id.as_str(), client)).collect())
            .unwrap_or_default();
        let clients = status.clients.iter().map(|client| {
            let before = known.get(client.id.as_str()).map(|client| (client.outbound, client.inbound));
            (client.id.clone(), rates(before, (client.outbound, client.inbound)))
        });
        let clients = clients.collect();
        let workers = status.workers.iter().enumerate().map(|(at, worker)| {
            let before = before.and_then(|before| before.workers.get(at));
            rates(before.map(|worker| (worker.outbound, worker.inbound)), (worker.outbound, worker.inbound))
        });
        let workers = workers.collect();
        let drops = status.drops.iter().filter_map(|(reason, now)| {
            let before = before?.drops.get(reason).copied().unwrap_or(0);
            (passed > 0.0).then(|| (reason.clone(), rate(before, *now, passed)))
        });
        let drops = drops.filter(|(_, rate)| *rate > 0.0).collect();
        (self.clients, self.workers, self.drops) = (clients, workers, drops);
        (self.status, self.at) = (Some(status), Some(at));
        self.first =
            self.first.min(self.status.as_ref().map_or(0, |status| status.clients.len()).saturating_sub(1));
    }

    /// True if that is the end.
    fn on_key(&mut self, key: KeyEvent) -> bool {
        let last = self.status.as_ref().map_or(0, |status| status.clients.len().saturating_sub(1));
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('s') => (self.sort, self.first) = (self.sort.next(), 0),
            KeyCode::Char('r') => (self.reverse, self.first) = (!self.reverse, 0),
            KeyCode::Down | KeyCode::Char('j') => self.first = (self.first + 1).min(last),
            KeyCode::Up | KeyCode::Char('k') => self.first = self.first.saturating_sub(1),
            KeyCode::PageDown => self.first = (self.first + 10).min(last),
            KeyCode::PageUp => self.first = self.first.saturating_sub(10),
            KeyCode::Home => self.first = 0,
            _ => {}
        }
        false
    }

    fn rate_of(&self, client: &Client) -> Rate {
        self.clients.get(&client.id).copied().unwrap_or_default()
    }

    fn sorted(&self) -> Vec<&Client> {
        let mut clients: Vec<_> = self.status.iter().flat_map(|status| &status.clients).collect();
        let total = |client: &Client| client.outbound.bytes.saturating_add(client.inbound.bytes);
        let handshake = |client: &Client| client.handshake_age_seconds.unwrap_or(f64::MAX);
        clients.sort_by(|a, b| {
            let order = match self.sort {
                Sort::Rate => {
                    let sum = |client| self.rate_of(client).iter().sum::<f64>();
                    sum(b).total_cmp(&sum(a))
                }
                Sort::Total => total(b).cmp(&total(a)),
                Sort::Handshake => handshake(a).total_cmp(&handshake(b)),
                Sort::Id => std::cmp::Ordering::Equal,
            };
            let order = order.then_with(|| a.id.cmp(&b.id));
            if self.reverse { order.reverse() } else { order }
        });
        clients
    }

    fn style(&self, colour: Color) -> Style {
        if self.colour { Style::new().fg(colour) } else { Style::new() }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let workers = self.status.as_ref().map_or(0, |status| status.workers.len());
        // Half of a small terminal at most.
        let rows = u16::try_from(workers).unwrap_or(u16::MAX).min(frame.area().height.saturating_sub(8) / 2);
        let areas = Layout::vertical([
            Constraint::Length(3),
            Constraint::Length(rows + 1),
            Constraint::Min(2),
            Constraint::Length(1),
        ]);
        let [head, workers, clients, foot] = areas.areas(frame.area());
        self.draw_head(frame, head);
        self.draw_workers(frame, workers);
        self.draw_clients(frame, clients);
        let keys = format!(
            "q quit  s sort: {}{}  r reverse  up/down scroll",
            self.sort.name(),
            if self.reverse { ", reversed" } else { "" }
        );
        frame.render_widget(Paragraph::new(keys).style(Style::new().add_modifier(Modifier::DIM)), foot);
    }

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut lines = Vec::new();
        if let Some(status) = &self.status {
            let away = status.portal.away_seconds.map(|seconds| format!("portal away for {}", age(seconds)));
            let ready = match status.ready {
                true => "ready".to_owned(),
                false => format!("not ready, for want of {}", status.missing.join(", ")),
            };
            let total = self.workers.iter().fold([0.0; 2], |sum, rate| [sum[0] + rate[0], sum[1] + rate[1]]);
            lines.push(Line::from(format!(
                "firezone-gateway {}, up {}, {ready}, {}",
                status.version,
                age(status.uptime_seconds),
                away.as_deref().unwrap_or("portal connected")
            )));
            lines.push(Line::from(format!(
                "{} clients, {} relays, out {}, in {}, fast path: {}",
                status.clients_total,
                status.relays.iter().filter(|relay| relay.active.is_some()).count(),
                per_second(total[0]),
                per_second(total[1]),
                fast_path(&status.fast_path)
            )));
        }
        let (text, style) = match &self.trouble {
            Some(trouble) => (trouble.clone(), self.style(Color::Red)),
            None if self.drops.is_empty() => ("dropped: nothing now".to_owned(), Style::new()),
            None => {
                let drops = self.drops.iter().map(|(reason, rate)| format!("{reason} {rate:.0}/s"));
                (format!("dropped: {}", drops.collect::<Vec<_>>().join(", ")), self.style(Color::Yellow))
            }
        };
        lines.push(Line::styled(text, style));
        frame.render_widget(Paragraph::new(lines), area);
    }

    fn draw_workers(&self, frame: &mut Frame<'_>, area: Rect) {
        let workers = self.status.iter().flat_map(|status| &status.workers).zip(&self.workers);
        let rows = workers.map(|(worker, rate)| {
            let busy = worker.busy_share >= SATURATED;
            let style = if busy { self.style(Color::Red) } else { Style::new() };
            Row::new([
                worker.id.to_string(),
                format!("{:.0} %", worker.busy_share * 100.0),
                worker.clients.to_string(),
                per_second(rate[0]),
                per_second(rate[1]),
                bytes(worker.handover_bytes_waiting as u64),
                worker.commands_waiting.to_string(),
            ])
            .style(style)
        });
        let widths = [6, 6, 8, 12, 12, 12, 9].map(Constraint::Length);
        let head = ["WORKER", "BUSY", "CLIENTS", "OUT", "IN", "PASSED ON", "COMMANDS"];
        frame.render_widget(Table::new(rows, widths).header(Row::new(head).style(heading())), area);
    }

    fn draw_clients(&self, frame: &mut Frame<'_>, area: Rect) {
        // A whole id where there is room for it.
        let id_width: u16 = if area.width >= 110 { 36 } else { 13 };
        let rows = self.sorted().into_iter().skip(self.first).map(|client| {
            let rate = self.rate_of(client);
            let (kind, endpoint) = client.path.as_ref().map_or((client.connection.as_str(), ""), |path| {
                (path.kind.as_str(), path.endpoint.as_str())
            });
            let style = if kind == "direct" { Style::new() } else { self.style(Color::Yellow) };
            Row::new([
                Cell::new(cut(&client.id, usize::from(id_width))),
                Cell::new(kind.to_owned()).style(style),
                Cell::new(cut(endpoint, 21)),
                Cell::new(client.handshake_age_seconds.map_or_else(|| "-".to_owned(), short_age)),
                Cell::new(per_second(rate[0])),
                Cell::new(per_second(rate[1])),
            ])
        });
        let widths = [id_width, 10, 21, 6, 12, 12].map(Constraint::Length);
        let head = ["CLIENT", "PATH", "ENDPOINT", "SHAKEN", "OUT", "IN"];
        frame.render_widget(Table::new(rows, widths).header(Row::new(head).style(heading())), area);
    }
}

fn heading() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with three digits")]
fn rate(before: u64, now: u64, seconds: f64) -> f64 {
    now.saturating_sub(before) as f64 / seconds
}

/// Short enough for one line of 80 characters.
fn fast_path(now: &FastPath) -> String {
    match &now.mode {
        Some(mode) if now.on => mode.clone(),
        Some(_) => "switched off".to_owned(),
        None => "off".to_owned(),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are small and not negative"
)]
fn per_second(rate: f64) -> String {
    format!("{}/s", bytes(rate.round() as u64))
}

/// One unit.
fn short_age(seconds: f64) -> String {
    age(seconds).split(' ').next().unwrap_or_default().to_owned()
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['~']).collect()
}

/// Until `q`.
///
/// # Errors
/// There is no gateway at the start, or no terminal.
pub fn run(socket: &Path) -> Result<()> {
    use std::io::IsTerminal as _;
    ensure!(
        std::io::stdout().is_terminal() && std::io::stdin().is_terminal(),
        "`top` draws on a terminal, and this is none; use `status` in pipes"
    );
    // What is wrong at the start is better said below the prompt.
    drop(Connection::connect(socket)?);
    let (looks, seen) = channel();
    let (ended, end) = channel();
    let socket = socket.to_owned();
    let watcher = std::thread::spawn(move || watch(socket, &looks, &end));
    // https://no-color.org: set, and not empty.
    let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut terminal = ratatui::try_init().context("Cannot draw on this terminal")?;
    let result = show(&mut terminal, &seen, &mut View::new(colour));
    ratatui::try_restore().context("Cannot give the terminal back as it was")?;
    drop(ended);
    drop(seen);
    // It may wait for a gateway that hangs; the process ends all the same.
    if watcher.is_finished() {
        let _ = watcher.join();
    }
    result
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    seen: &Receiver<(Result<Status, String>, Instant)>,
    view: &mut View,
) -> Result<()> {
    loop {
        for (look, at) in seen.try_iter() {
            view.on_look(look, at);
        }
        terminal.draw(|frame| view.draw(frame)).context("Cannot draw")?;
        if event::poll(KEYS).context("Cannot read keys")?
            && let Event::Key(key) = event::read().context("Cannot read keys")?
            && key.kind == KeyEventKind::Press
            && view.on_key(key)
        {
            return Ok(());
        }
    }
}

/// Looks once a second, and connects again where it must, until nobody wants to see any more.
fn watch(socket: PathBuf, looks: &Sender<(Result<Status, String>, Instant)>, end: &Receiver<()>) {
    let mut connection: Option<Connection> = None;
    loop {
        let mut look = || -> Result<Status> {
            let open = match &mut connection {
                Some(open) => open,
                none => none.insert(Connection::connect(&socket)?),
            };
            open.ask_for("status", Value::Null)
        };
        let seen = look().map_err(|e| format!("{e:#}"));
        if seen.is_err() {
            connection = None;
        }
        if looks.send((seen, Instant::now())).is_err() {
            return;
        }
        match end.recv_timeout(INTERVAL) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};
    use serde_json::json;

    use super::*;

    /// Two clients, one worker; `step` of them carried so much more.
    fn status(pid: u32, step: u64) -> Status {
        let volume = |bytes: u64| json!({ "packets": bytes / 1000, "bytes": bytes });
        let client = |id: &str, kind: &str, out: u64, handshake: Option<f64>| {
            json!({
                "id": id, "tunnel": ["100.64.0.9", "fd00:2021:1111::9"], "worker": 0, "connection": "connected",
                "path": { "kind": kind, "ends": "peer_to_peer", "endpoint": "198.51.100.7:51820", "local": null,
                          "relay": null, "channel": null },
                "handshake_age_seconds": handshake, "outbound": volume(out), "inbound": volume(out * 2),
                "translated": 0, "flows": null, "names": 0, "resources": [],
            })
        };
        serde_json::from_value(json!({
            "version": "0.1.0", "compat_version": "1.5.0", "pid": pid, "uptime_seconds": 3725.0, "ready": true,
            "missing": [], "portal": { "connected": true, "away_seconds": null, "joins": 1, "failures": 0 },
            "tun": { "name": "tun-firezone", "up": true, "addresses": [] },
            "dns": { "listening": true, "queries": 0, "answered": 0, "failed": 0 },
            "capabilities": {}, "capabilities_missing": {}, "fast_path": { "on": false, "interface": null, "mode": null, "words": "off (--fast-path off)" },
            "drops": { "not_allowed": step * 7 },
            "workers": [{ "id": 0, "busy_share": 0.95, "clients": 2, "outbound": volume(step * 3000),
                          "inbound": volume(0), "handed_over": 0, "handover_bytes_waiting": 0,
                          "commands_waiting": 0 }],
            "relays": [], "clients_total": 2,
            "clients": [
                client("aaaaaaaa-0000-0000-0000-000000000001", "direct", 5_000_000 + step * 1024, Some(5.0)),
                client("bbbbbbbb-0000-0000-0000-000000000002", "relayed", step * 2048, None),
            ],
        }))
        .unwrap()
    }

    fn screen(view: &View, width: u16, height: u16) -> (String, bool) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let coloured = buffer.content().iter().any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset);
        let rows = buffer.content().chunks(usize::from(width));
        let rows =
            rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned());
        (rows.collect::<Vec<_>>().join("\n"), coloured)
    }

    fn seen_twice(colour: bool) -> View {
        let mut view = View::new(colour);
        let start = Instant::now();
        view.on_look(Ok(status(1, 0)), start);
        view.on_look(Ok(status(1, 1)), start + INTERVAL);
        view
    }

    #[test]
    fn rates_are_what_was_carried_since_the_last_look() {
        let view = seen_twice(true);
        let (text, coloured) = screen(&view, 80, 24);
        for expect in [
            "not_allowed 7/s",
            "aaaaaaaa-000~",
            "relayed",
            "198.51.100.7:51820",
            "1.0 KiB/s",
            "2.0 KiB/s",
            "4.0 KiB/s",
            "95 %",
            "2.9 KiB/s",
            "q quit",
            "up 1h 2m, ready, portal connected",
        ] {
            assert!(text.contains(expect), "{expect}:\n{text}");
        }
        assert!(coloured);
        assert!(text.lines().all(|line| line.chars().count() <= 80));
        assert!(!screen(&seen_twice(false), 80, 24).1, "NO_COLOR");
    }

    #[test]
    fn another_process_does_not_count_on() {
        let mut view = seen_twice(true);
        view.on_look(Ok(status(2, 0)), Instant::now() + 3 * INTERVAL);
        assert!(view.clients.values().flatten().all(|rate| *rate == 0.0), "{view:?}");
        assert!(view.drops.is_empty());
    }

    #[test]
    fn keys_sort_scroll_and_end() {
        let key = |code| KeyEvent::new(code, KeyModifiers::NONE);
        let mut view = seen_twice(true);
        let order =
            |view: &View| view.sorted().iter().map(|client| client.id[..1].to_owned()).collect::<String>();
        // By rate, total, handshake, id.
        for expect in ["ba", "ab", "ab", "ab"] {
            assert_eq!(order(&view), expect, "{:?}", view.sort);
            assert!(!view.on_key(key(KeyCode::Char('s'))));
        }
        view.on_key(key(KeyCode::Char('r')));
        assert_eq!(order(&view), "ab");
        for (code, first) in [(KeyCode::Down, 1), (KeyCode::PageDown, 1), (KeyCode::Up, 0), (KeyCode::Up, 0)]
        {
            view.on_key(key(code));
            assert_eq!(view.first, first, "{code:?}");
        }
        assert!(view.on_key(key(KeyCode::Char('q'))) && view.on_key(key(KeyCode::Esc)));
        assert!(view.on_key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn a_gateway_that_went_is_told_and_small_terminals_do_no_harm() {
        let mut view = seen_twice(true);
        view.on_look(Err("No gateway listens".to_owned()), Instant::now());
        assert!(screen(&view, 80, 24).0.contains("No gateway listens"));
        for (width, height) in [(1, 1), (10, 3), (20, 8), (79, 23), (200, 60)] {
            screen(&view, width, height);
            screen(&View::new(true), width, height);
        }
    }
}
