//! `bothy vm stats`: how much machines use.

use super::many::{Failures, Targets};
use crate::{
    Context, Status,
    printer::{Printer, size, table},
    terminal,
};
use bothy_contract::{
    Error, VmId,
    usage::{VmStats, VmStatsList},
    vm::{VmList, VmRecord},
};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write as _, io::IsTerminal, time::Duration};

/// How often `--watch` looks.
const EVERY: Duration = Duration::from_secs(2);
/// Between two readings where one alone cannot say how busy a processor is.
const SAMPLE: Duration = Duration::from_millis(500);
/// How many machines one request names: that many ids are 8 KiB of its path.
const AT_ONCE: usize = 200;

/// A reading with the machine's name, which is what people and scripts know.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    #[serde(flatten)]
    stats: &'a VmStats,
}

pub(super) async fn main(context: &Context, refs: &[String], watch: bool) -> Result<Status, Error> {
    let targets = if refs.is_empty() { None } else { Some(Targets::named(context, refs).await?) };
    let printer = context.printer;
    let failures = targets.as_ref().map(|targets| Failures::of(targets, |failure| printer.failure(failure)));
    // With none that is known there is nothing to show.
    if targets.as_ref().is_none_or(|targets| !targets.vms.is_empty()) {
        let named = targets.as_ref().map(|targets| targets.vms.as_slice());
        let first = read(context, named).await?;
        let first = if !watch && first.lacks_cpu() {
            tokio::time::sleep(SAMPLE).await;
            read(context, named).await?
        } else {
            first
        };
        let mut shown = show(printer, &first, watch);
        while watch && shown {
            tokio::time::sleep(EVERY).await;
            shown = show(printer, &read(context, named).await?, watch);
        }
    }
    failures.map_or(Ok(Status::SUCCESS), Failures::end)
}

/// Readings, and the machines that they are of.
struct Reading {
    vms: BTreeMap<VmId, VmRecord>,
    stats: Vec<VmStats>,
}

impl Reading {
    /// Whether a machine runs of which it is not known how busy it is: that takes two readings.
    fn lacks_cpu(&self) -> bool {
        self.stats.iter().any(|s| s.cpu_us.is_some() && s.cpu_percent.is_none())
    }

    fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.stats.iter().filter_map(|stats| {
            let vm = self.vms.get(&stats.vm)?;
            Some(Row { name: vm.name.as_str(), stats })
        })
    }
}

/// Reads those of `named`, or all that run.
async fn read(context: &Context, named: Option<&[VmRecord]>) -> Result<Reading, Error> {
    let Some(named) = named else {
        let (list, stats) = tokio::join!(
            context.gateway.get::<VmList>("/v1/vms"),
            context.gateway.get::<VmStatsList>("/v1/stats")
        );
        let vms = list?.vms.into_iter().map(|vm| (vm.id, vm)).collect();
        return Ok(Reading { vms, stats: stats?.stats });
    };
    let mut stats = Vec::with_capacity(named.len());
    for some in named.chunks(AT_ONCE) {
        let ids: Vec<_> = some.iter().map(|vm| format!("vm={}", vm.id)).collect();
        let path = format!("/v1/stats?{}", ids.join("&"));
        stats.append(&mut context.gateway.get::<VmStatsList>(&path).await?.stats);
    }
    Ok(Reading { vms: named.iter().map(|vm| (vm.id, vm.clone())).collect(), stats })
}

/// Prints a reading. Returns whether anybody reads on.
fn show(printer: Printer, reading: &Reading, again: bool) -> bool {
    if printer.json {
        return reading.rows().all(|row| {
            let text = serde_json::to_string(&row).unwrap_or_default();
            printer.write(&format!("{text}\n"))
        });
    }
    let mut text = if reading.stats.is_empty() {
        "no machine runs; `bothy vm stats VM...` shows others".to_owned()
    } else {
        listing(reading)
    };
    text.push('\n');
    if again && std::io::stdout().is_terminal() {
        let (rows, columns) = terminal::window().map_or((24, 80), |w| (w.rows as usize, w.cols as usize));
        return printer.write(&redrawn(&text, rows, columns));
    }
    // Readings that follow one another are told apart by an empty line.
    if again {
        text.push('\n');
    }
    printer.write(&text)
}

/// The text from the top of the terminal on (ECMA-48: CUP, EL, ED), as much as fits: written over the last one, line by
/// line, so that nothing flickers.
fn redrawn(text: &str, rows: usize, columns: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    let fit = rows.saturating_sub(1).max(2);
    let shown = if lines.len() > fit { fit - 1 } else { lines.len() };
    let mut out = String::from("\x1b[H");
    // Writing to a String cannot fail.
    for line in lines.iter().take(shown) {
        // A line that wrapped would be two.
        let line: String = line.chars().take(columns).collect();
        let _ = writeln!(out, "{line}\x1b[K");
    }
    if lines.len() > shown {
        let _ = writeln!(out, "... and {} more\x1b[K", lines.len() - shown);
    }
    out.push_str("\x1b[J");
    out
}

fn listing(reading: &Reading) -> String {
    let or = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    table(
        &["NAME", "CPU %", "MEMORY", "WORK DISK", "SYSTEM DISK", "NET IN", "NET OUT", "UPTIME"],
        &["CPU %", "MEMORY", "WORK DISK", "SYSTEM DISK", "NET IN", "NET OUT", "UPTIME"],
        reading.rows().map(|Row { name, stats }| {
            vec![
                name.to_owned(),
                or(stats.cpu_percent.map(|percent| format!("{percent:.1}"))),
                // The host's, which is more than the guest has: the VMM needs some for itself.
                or(stats.memory_bytes.map(size)),
                or(stats.disks.map(|d| of(d.work_allocated, d.work_size))),
                or(stats.disks.map(|d| of(d.system_allocated, d.system_size))),
                or(stats.received_bytes.map(size)),
                or(stats.sent_bytes.map(size)),
                or(stats.uptime_s.map(uptime)),
            ]
        }),
    )
}

fn of(has: u64, whole: u64) -> String {
    format!("{} / {}", size(has), size(whole))
}

/// Seconds in the two units that suit them.
fn uptime(s: u64) -> String {
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{ImageName, image::DiskUsage, vm::Shape};

    fn reading() -> Reading {
        let vm = |name: &str| {
            let name = name.parse().unwrap();
            VmRecord::new(VmId::new(), name, 0, ImageName::default_image(), Shape::default())
        };
        let (web, db) = (vm("web"), vm("db"));
        let none = VmStats {
            vm: db.id,
            at: jiff::Timestamp::UNIX_EPOCH,
            uptime_s: None,
            cpu_us: None,
            cpu_percent: None,
            memory_bytes: None,
            disks: None,
            received_bytes: None,
            sent_bytes: None,
            guest: None,
        };
        let some = VmStats {
            vm: web.id,
            uptime_s: Some(93_784),
            cpu_us: Some(1),
            cpu_percent: Some(103.25),
            memory_bytes: Some(221 << 20),
            disks: Some(DiskUsage {
                work_size: 10 << 30,
                work_allocated: 5 << 20,
                system_size: 10 << 30,
                system_allocated: 0,
                own_root: false,
            }),
            received_bytes: Some(1500),
            sent_bytes: Some(0),
            ..none.clone()
        };
        Reading { vms: [(web.id, web), (db.id, db)].into(), stats: vec![some, none] }
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        insta::assert_snapshot!(listing(&reading()), @r"
        NAME  CPU %     MEMORY           WORK DISK     SYSTEM DISK   NET IN  NET OUT   UPTIME
        web   103.2  221.0 MiB  5.0 MiB / 10.0 GiB  0 B / 10.0 GiB  1.5 KiB      0 B  1 d 2 h
        db        -          -                   -               -        -        -        -
        ");
        assert!(!reading().lacks_cpu());
    }

    #[test]
    fn a_row_has_the_contracts_names_and_the_machines() {
        let reading = reading();
        let row = serde_json::to_value(reading.rows().next().unwrap()).unwrap();
        assert!(
            row["name"] == "web" && row["cpu_percent"] == 103.25 && row["disks"]["work_size"] == 10u64 << 30
        );
        let rest = serde_json::to_value(reading.rows().nth(1).unwrap()).unwrap();
        assert!(rest.get("uptime_s").is_none(), "{rest}");
    }

    #[test]
    fn a_redraw_never_scrolls() {
        let text: String = (0..50).map(|n| format!("{n}\n")).collect();
        let drawn = redrawn(&text, 10, 80);
        assert_eq!(drawn.lines().count() - 1, 9, "{drawn:?}");
        assert!(drawn.contains("... and 42 more"), "{drawn:?}");
        assert!(!redrawn("a\nb\n", 10, 80).contains("more"));
        assert!(redrawn("abcdef\n", 10, 4).contains("abcd\x1b[K"));
    }

    #[test]
    fn uptimes() {
        assert_eq!(
            [uptime(59), uptime(61), uptime(3_660), uptime(93_784)],
            ["59 s", "1 min 1 s", "1 h 1 min", "1 d 2 h"]
        );
    }
}
