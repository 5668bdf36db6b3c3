//! The tree that layers make, one laid over the other, in memory.
//!
//! Paths are walked here and nowhere else, from the tree's own root. A symbolic link on the way is followed inside the tree,
//! `..` in its target stops at the root, and missing directories are made: what a container runtime does inside its root.

use crate::layer::{Item, Meta, Placed};
use crate::space::Span;
use bothy_contract::Error;
use std::collections::BTreeMap;

/// A node of a [`Tree`].
pub(crate) type Id = usize;
/// The root.
pub(crate) const ROOT: Id = 0;
/// How many symbolic links a path may lead through: Linux' own bound.
const MAX_LINKS: u32 = 40;
/// The longest name in a directory.
const MAX_NAME: usize = 255;
/// The longest target of a link.
const MAX_TARGET: usize = 4095;

/// A file, directory or whatever else has an inode.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Body {
    Directory(BTreeMap<Box<[u8]>, Id>),
    File(Span),
    Symlink(Vec<u8>),
    Device { block: bool, major: u32, minor: u32 },
    Fifo,
}

/// All nodes; those that no name leads to any more are still among them.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
}

/// One step of a path.
#[derive(Debug, Clone)]
enum Step {
    Root,
    Up,
    Into(Vec<u8>),
}

impl Tree {
    /// A tree of nothing but its root.
    pub(crate) fn new() -> Self {
        Self { nodes: vec![directory()] }
    }

    /// The node with that number.
    pub(crate) fn node(&self, id: Id) -> Option<&Node> {
        self.nodes.get(id)
    }

    /// What has that name in a directory.
    pub(crate) fn child(&self, id: Id, name: &[u8]) -> Option<Id> {
        match self.node(id).map(|n| &n.body) {
            Some(Body::Directory(children)) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children(&mut self, id: Id) -> Option<&mut BTreeMap<Box<[u8]>, Id>> {
        match self.nodes.get_mut(id).map(|n| &mut n.body) {
            Some(Body::Directory(children)) => Some(children),
            _ => None,
        }
    }

    /// Gives `node` a name in a directory, in place of what has it.
    pub(crate) fn put(&mut self, parent: Id, name: &[u8], node: Node) {
        let id = self.nodes.len();
        self.nodes.push(node);
        if let Some(children) = self.children(parent) {
            children.insert(name.into(), id);
        }
    }

    /// Lays a layer over what is there. What it hides is hidden first: that is meant of the layers below alone, wherever in
    /// the layer it is said.
    pub(crate) fn apply(&mut self, entries: Vec<Item>, whiteouts: bool) -> Result<(), Error> {
        let mut rest = Vec::with_capacity(entries.len());
        for entry in entries {
            if !whiteouts || !self.hide(&entry.path)? {
                rest.push(entry);
            }
        }
        for entry in rest {
            let path = entry.path.clone();
            self.add(entry).map_err(|e| e.context(format!("the entry {}", shown(&path))))?;
        }
        Ok(())
    }

    /// Hides what the name of a whiteout says, if it is one.
    fn hide(&mut self, path: &[u8]) -> Result<bool, Error> {
        let end = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        let (parent, name) = path.split_at(end);
        let Some(hidden) = name.strip_prefix(b".wh.") else { return Ok(false) };
        let parent = self
            .walk(&steps(parent)?, false)
            .map_err(|e| e.context(format!("the whiteout {}", shown(path))))?;
        let Some(parent) = parent else { return Ok(true) };
        if hidden == b".wh..opq" {
            if let Some(children) = self.children(parent) {
                children.clear();
            }
        } else if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Error::invalid(format!("the whiteout {} hides no name", shown(path))));
        } else if !hidden.starts_with(b".wh.") {
            // What else begins so is bookkeeping of a union file system of old.
            if let Some(children) = self.children(parent) {
                children.remove(hidden);
            }
        }
        Ok(true)
    }

    fn add(&mut self, entry: Item) -> Result<(), Error> {
        let Item { path, meta, kind } = entry;
        let mut way = steps(&path)?;
        let Some(Step::Into(name)) = way.pop() else {
            return match (kind, self.nodes.get_mut(ROOT)) {
                (Placed::Directory, Some(root)) => {
                    root.meta = meta;
                    Ok(())
                }
                _ => Err(Error::invalid("the root can only be a directory")),
            };
        };
        let Some(parent) = self.walk(&way, true)? else {
            return Err(Error::invalid("there is no directory for it"));
        };
        let there = self.child(parent, &name);
        let body = match kind {
            Placed::Directory => {
                let old = there.and_then(|id| self.nodes.get_mut(id));
                if let Some(old) = old.filter(|n| matches!(n.body, Body::Directory(_))) {
                    old.meta = meta;
                    return Ok(());
                }
                Body::Directory(BTreeMap::new())
            }
            Placed::HardLink(target) => {
                let id = self.target(&target)?;
                if let Some(children) = self.children(parent) {
                    children.insert(name.into(), id);
                }
                return Ok(());
            }
            Placed::Symlink(target) if target.is_empty() || target.len() > MAX_TARGET => {
                return Err(Error::invalid("the link's target is empty or too long"));
            }
            Placed::Symlink(target) => Body::Symlink(target),
            Placed::File(span) => Body::File(span),
            Placed::Device { block, major, minor } => Body::Device { block, major, minor },
            Placed::Fifo => Body::Fifo,
        };
        self.put(parent, &name, Node { meta, body });
        Ok(())
    }

    /// What a hard link leads to. Its last name is not followed where it is a symbolic link, as linkat(2) has it.
    fn target(&mut self, path: &[u8]) -> Result<Id, Error> {
        let wrong = |why: &str| Error::invalid(format!("it is a hard link to {}, {why}", shown(path)));
        let mut way = steps(path)?;
        let Some(Step::Into(name)) = way.pop() else { return Err(wrong("which is a directory")) };
        let parent = self.walk(&way, false)?;
        let id = parent.and_then(|p| self.child(p, &name)).ok_or_else(|| wrong("which is not there"))?;
        match self.node(id).map(|n| &n.body) {
            Some(Body::Directory(_)) => Err(wrong("which is a directory")),
            _ => Ok(id),
        }
    }

    /// The directory at the end of a way; missing ones are made if `make`, else there is none.
    fn walk(&mut self, way: &[Step], make: bool) -> Result<Option<Id>, Error> {
        let mut left: Vec<Step> = way.iter().rev().cloned().collect();
        let mut at = vec![ROOT];
        let mut links = 0;
        while let Some(step) = left.pop() {
            let here = at.last().copied().unwrap_or(ROOT);
            let name = match step {
                Step::Root => {
                    at.truncate(1);
                    continue;
                }
                Step::Up => {
                    if at.len() > 1 {
                        at.pop();
                    }
                    continue;
                }
                Step::Into(name) => name,
            };
            let Some(id) = self.child(here, &name) else {
                if !make {
                    return Ok(None);
                }
                self.put(here, &name, directory());
                at.push(self.nodes.len() - 1);
                continue;
            };
            match self.node(id).map(|n| &n.body) {
                Some(Body::Directory(_)) => at.push(id),
                Some(Body::Symlink(target)) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Error::invalid("its path leads through too many symbolic links"));
                    }
                    let mut through = Vec::new();
                    if target.starts_with(b"/") {
                        through.push(Step::Root);
                    }
                    for part in target.split(|b| *b == b'/') {
                        match part {
                            b"" | b"." => {}
                            b".." => through.push(Step::Up),
                            part if part.len() > MAX_NAME => return Err(long(part)),
                            part => through.push(Step::Into(part.to_vec())),
                        }
                    }
                    left.extend(through.into_iter().rev());
                }
                _ if make => return Err(Error::invalid(format!("{} is not a directory", shown(&name)))),
                _ => return Ok(None),
            }
        }
        Ok(at.last().copied())
    }
}

fn directory() -> Node {
    Node { meta: Meta { mode: 0o755, ..Meta::default() }, body: Body::Directory(BTreeMap::new()) }
}

/// The steps of an entry's name from the root, whether a slash is in front or not.
fn steps(path: &[u8]) -> Result<Vec<Step>, Error> {
    let mut steps = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                return Err(Error::invalid(format!(
                    "{} leads upwards, which no honest archive has",
                    shown(path)
                )));
            }
            part if part.len() > MAX_NAME => return Err(long(part)),
            part => steps.push(Step::Into(part.to_vec())),
        }
    }
    Ok(steps)
}

fn long(name: &[u8]) -> Error {
    Error::invalid(format!("a name of {} bytes is longer than any file system has them", name.len()))
}

/// A name in a message: without control characters, and not all of a long one.
fn shown(name: &[u8]) -> String {
    let text = name.escape_ascii().to_string();
    match text.char_indices().nth(120) {
        Some((at, _)) => format!("`{}...`", text.get(..at).unwrap_or_default()),
        None => format!("`{text}`"),
    }
}
