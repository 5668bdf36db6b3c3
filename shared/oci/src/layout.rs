//! What is in an archive: a root file system, or an OCI layout, whose layers are then taken from where they are in it.

use crate::{Contents, LayerAt, documents};
use bothy_contract::{Code, Error, image::Defaults};
use bothy_flatten::{Beat, Decoder, Kind, Reader, failed};
use fs_err::File;
use std::{
    collections::BTreeMap,
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

/// So many entries tell what a compressed archive is.
const TELLING: usize = 64;
/// A layout has a handful of blobs.
const MAX_FILES: usize = 10_000;
/// How often an index may lead to an index.
const MAX_DEPTH: usize = 4;

/// Finds out what the file `archive` holds. `dir` takes it decompressed in its place, where that is needed, and if that is no more
/// than `room` bytes; `beat` hears of each piece that was read for it.
///
/// # Errors
/// It is neither a root file system nor an OCI layout, or not whole, or it cannot be read.
pub fn look_into(archive: &Path, dir: &Path, room: u64, beat: Beat<'_>) -> Result<Contents, Error> {
    let compressed = decoder(archive)?.is_compressed();
    if !tells_layout(archive, compressed)? {
        return root(archive);
    }
    if !compressed {
        return Layout::open(archive)?.contents();
    }
    let plain = dir.join("archive.tar");
    let mut to = File::create_new(&plain).map_err(|e| failed("cannot decompress the archive", &e))?;
    let (source, _) = open(archive)?;
    bothy_flatten::decompress(source, &mut to, room, beat)?;
    fs_err::remove_file(archive).map_err(|e| failed("cannot remove the archive", &e))?;
    Layout::open(&plain)?.contents()
}

fn open(path: &Path) -> Result<(File, u64), Error> {
    let unread = |e: io::Error| failed("cannot read the archive", &e);
    let file = File::open(path).map_err(unread)?;
    let length = file.metadata().map_err(unread)?.len();
    Ok((file, length))
}

fn decoder(path: &Path) -> Result<Decoder<BufReader<File>>, Error> {
    Decoder::new(BufReader::with_capacity(256 << 10, open(path)?.0)).map_err(|e| e.context("the archive"))
}

fn root(archive: &Path) -> Result<Contents, Error> {
    let (_, length) = open(archive)?;
    let layer = LayerAt { file: archive.to_owned(), offset: 0, length, digest: None, diff_id: None };
    Ok(Contents { layers: vec![layer], defaults: Defaults::default(), digest: None })
}

fn plain(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    name.trim_start_matches("./").trim_start_matches('/').to_owned()
}

/// Whether an archive is that of a layout: the file `oci-layout` is in its root, and of one that is compressed and so not
/// read as a whole, nothing else that a layout has not.
fn tells_layout(archive: &Path, compressed: bool) -> Result<bool, Error> {
    let mut reader = Reader::new(decoder(archive)?);
    let mut seen = 0;
    while let Some(entry) = reader.entry().map_err(|e| e.context("the archive"))? {
        let name = plain(&entry.path);
        let first = name.split('/').next().unwrap_or_default();
        match first {
            "oci-layout" => return Ok(true),
            "blobs" | "index.json" | "manifest.json" | "repositories" | "" => {}
            // Those of `docker save` of old.
            _ if name.ends_with("/layer.tar") || name.ends_with(".json") => {}
            _ => return Ok(false),
        }
        seen += 1;
        if (compressed && seen > TELLING) || seen > MAX_FILES {
            break;
        }
    }
    if seen == 0 {
        return Err(Error::invalid("the archive is empty"));
    }
    Err(Error::invalid("the archive looks like an OCI image's, and has no file `oci-layout`")
        .hint("save it as an OCI archive: `skopeo copy ... oci-archive:FILE`, or `docker save` of Docker 25 or later"))
}

/// A layout in an archive: where each of its files is.
struct Layout {
    file: PathBuf,
    at: BTreeMap<String, (u64, u64)>,
}

impl Layout {
    fn open(file: &Path) -> Result<Self, Error> {
        let mut reader = Reader::new(BufReader::with_capacity(1 << 20, open(file)?.0));
        let mut at = BTreeMap::new();
        while let Some(entry) = reader.entry().map_err(|e| e.context("the archive"))? {
            if let Kind::File(size) = entry.kind {
                at.insert(plain(&entry.path), (reader.position(), size));
            }
            if at.len() > MAX_FILES {
                return Err(Error::new(
                    Code::ResourceExhausted,
                    format!("the layout has more than {MAX_FILES} files"),
                ));
            }
        }
        Ok(Self { file: file.to_owned(), at })
    }

    fn find(&self, name: &str) -> Result<(u64, u64), Error> {
        self.at.get(name).copied().ok_or_else(|| {
            Error::invalid(format!("the layout has no file `{name}`"))
                .hint("it was not saved whole: save it again, with all its layers")
        })
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, Error> {
        let (offset, size) = self.find(name)?;
        if size > documents::MAX_DOCUMENT {
            return Err(Error::new(Code::ResourceExhausted, format!("`{name}` of the layout is too large")));
        }
        let unread = |e: io::Error| failed("cannot read the archive", &e);
        let mut file = open(&self.file)?.0;
        file.seek(SeekFrom::Start(offset)).map_err(unread)?;
        let mut text = Vec::new();
        file.take(size).read_to_end(&mut text).map_err(unread)?;
        Ok(text)
    }

    fn blob(&self, what: &str, sha256: &str) -> Result<Vec<u8>, Error> {
        let text = self.document(&format!("blobs/sha256/{sha256}"))?;
        documents::check(what, &text, sha256)?;
        Ok(text)
    }

    fn contents(&self) -> Result<Contents, Error> {
        let mut chosen = documents::choose(&self.document("index.json")?)?;
        for _ in 0..MAX_DEPTH {
            if !chosen.is_index() {
                break;
            }
            chosen = documents::choose(&self.blob("index", chosen.sha256()?)?)?;
        }
        let digest = chosen.sha256()?.to_owned();
        let manifest = documents::manifest(&self.blob("manifest", &digest)?)?;
        let text = self.blob("configuration", manifest.config.sha256()?)?;
        let (diff_ids, defaults) = documents::config(&text, manifest.layers.len())?;
        let mut layers = Vec::new();
        for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
            let sha256 = layer.sha256()?;
            let (offset, length) = self.find(&format!("blobs/sha256/{sha256}"))?;
            layers.push(LayerAt {
                file: self.file.clone(),
                offset,
                length,
                digest: Some(sha256.to_owned()),
                diff_id: Some(diff_id),
            });
        }
        Ok(Contents { layers, defaults, digest: Some(digest) })
    }
}
