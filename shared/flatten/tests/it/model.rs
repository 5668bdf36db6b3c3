//! Random layers against a model: paths in a map, one layer's changes after the other's.

use crate::support::{Archive, Bench, text};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
enum Op {
    File(String, u8),
    Dir(String),
    Symlink(String),
    Hide(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|p| p.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (path(), any::<u8>()).prop_map(|(p, n)| Op::File(p, n)),
        2 => path().prop_map(Op::Dir),
        1 => path().prop_map(Op::Symlink),
        2 => path().prop_map(Op::Hide),
        1 => path().prop_map(Op::Opaque),
    ]
}

type Model = BTreeMap<String, String>;

fn below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

fn ancestors(path: &str) -> Vec<String> {
    path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect()
}

/// Whether a path's directories are directories, or not there.
fn reachable(model: &Model, path: &str) -> bool {
    ancestors(path).iter().all(|a| model.get(a).is_none_or(|what| what == "dir"))
}

fn remove(model: &mut Model, path: &str) {
    model.retain(|p, _| p != path && !below(p, path));
}

fn put(model: &mut Model, path: &str, what: String) {
    for dir in ancestors(path) {
        model.insert(dir, "dir".into());
    }
    if what != "dir" || model.get(path).is_some_and(|w| w != "dir") {
        remove(model, path);
    }
    model.insert(path.to_owned(), what);
}

/// The layer's archive; what the model says cannot be is left out of both.
fn apply(model: &mut Model, ops: &[Op]) -> Vec<u8> {
    for op in ops {
        match op {
            Op::Hide(path) if reachable(model, path) => remove(model, path),
            Op::Opaque(dir) if reachable(model, dir) && model.get(dir).is_none_or(|w| w == "dir") => {
                model.retain(|p, _| !below(p, dir));
            }
            _ => {}
        }
    }
    let mut archive = Archive::new();
    for op in ops {
        match op {
            Op::File(path, n) if reachable(model, path) => {
                let data = n.to_string().repeat(usize::from(*n) * 40);
                archive = archive.file(path, &data);
                put(model, path, format!("file {data}"));
            }
            Op::Dir(path) if reachable(model, path) => {
                archive = archive.dir(path);
                put(model, path, "dir".into());
            }
            Op::Symlink(path) if reachable(model, path) => {
                archive = archive.symlink(path, "nowhere");
                put(model, path, "-> nowhere".into());
            }
            _ => {}
        }
    }
    archive.bytes()
}

/// The whiteouts of a layer, which come behind its entries and hold before them.
fn whiteouts(before: &Model, ops: &[Op]) -> Vec<u8> {
    let mut model = before.clone();
    let mut archive = Archive::new();
    for op in ops {
        match op {
            Op::Hide(path) if reachable(&model, path) => {
                let (dir, name) = path.rsplit_once('/').map_or(("", path.as_str()), |(d, n)| (d, n));
                archive = archive.file(&format!("{dir}/.wh.{name}"), "");
                remove(&mut model, path);
            }
            Op::Opaque(dir) if reachable(&model, dir) && model.get(dir).is_none_or(|w| w == "dir") => {
                archive = archive.file(&format!("{dir}/.wh..wh..opq"), "");
                model.retain(|p, _| !below(p, dir));
            }
            _ => {}
        }
    }
    archive.bytes()
}

/// Two archives in one: without the records of zeros at the first one's end.
fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    [&first[..first.len() - 1024], second].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_become_what_the_model_says(layers in prop::collection::vec(prop::collection::vec(op(), 0..12), 1..5)) {
        let mut model = Model::new();
        let mut archives = Vec::new();
        for ops in &layers {
            let hidden = whiteouts(&model, ops);
            let entries = apply(&mut model, ops);
            archives.push(join(&entries, &hidden));
        }
        let bench = Bench::new();
        bench.flatten(&archives);
        let expected: BTreeMap<Vec<u8>, String> = model.into_iter().map(|(p, w)| (p.into_bytes(), w)).collect();
        prop_assert_eq!(text(&bench.tree()), text(&expected));
    }
}
