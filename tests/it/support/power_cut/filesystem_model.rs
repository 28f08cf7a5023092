//! Model of a filesystem that promises no more than POSIX: content is durable after fsync of the
//! file, names after fsync of their directory. ext4 and xfs promise more: they also keep the order
//! of all changes of names.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Step;

/// What a power cut loses of the changes that were not made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: the filesystem has already written everything.
    Nothing,
    /// Contents. A new file is empty.
    Contents,
    /// The second half of each content.
    HalfOfContents,
    /// Contents, and names in every directory.
    Everything,
}

impl Loss {
    /// All kinds of loss.
    pub const ALL: [Self; 4] =
        [Self::Nothing, Self::Contents, Self::HalfOfContents, Self::Everything];
}

type Content = Arc<Vec<u8>>;
type Names = BTreeMap<OsString, usize>;

#[derive(Debug, Clone)]
enum Node {
    Dir { durable: Names, now: Names },
    File { durable: Content, dirty: bool },
    Link(PathBuf),
}

/// The content of a filesystem, durable and not. The root is node 0.
#[derive(Debug, Clone)]
pub struct FilesystemModel(Vec<Node>);

/// The content of a filesystem after a power cut. Hard links of a file have the same number.
pub type Tree = BTreeMap<PathBuf, Entry>;

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// A directory.
    Dir,
    /// A file: its number and its content.
    File(usize, Content),
    /// A symbolic link and its target.
    Link(PathBuf),
}

/// The later contents of each file, with the step after which it has them.
type Future = BTreeMap<usize, Vec<(usize, Content)>>;

impl FilesystemModel {
    /// Reads the current content of `root`, all of it durable.
    pub fn of(root: &Path) -> Self {
        let mut disk = Self(vec![empty_dir()]);
        disk.load(0, root, &mut BTreeMap::new());
        disk
    }

    fn load(&mut self, at: usize, dir: &Path, inodes: &mut BTreeMap<u64, usize>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            let known = inodes.get(&meta.ino()).copied();
            let id = known.unwrap_or_else(|| {
                self.add(if meta.is_dir() {
                    empty_dir()
                } else if meta.is_symlink() {
                    Node::Link(fs::read_link(&path).unwrap())
                } else {
                    Node::File { durable: Arc::new(fs::read(&path).unwrap()), dirty: false }
                })
            });
            inodes.insert(meta.ino(), id);
            if meta.is_dir() {
                self.load(id, &path, inodes);
            }
            let Node::Dir { durable, now } = &mut self.0[at] else { unreachable!() };
            durable.insert(entry.file_name(), id);
            now.insert(entry.file_name(), id);
        }
    }

    fn add(&mut self, node: Node) -> usize {
        self.0.push(node);
        self.0.len() - 1
    }

    fn find(&self, path: &Path) -> usize {
        path.iter().fold(0, |at, name| {
            let Node::Dir { now, .. } = &self.0[at] else {
                panic!("{} is in no directory", path.display())
            };
            *now.get(name).unwrap_or_else(|| {
                panic!("{} was made in a step that was not recorded", path.display())
            })
        })
    }

    fn names(&mut self, path: &Path) -> (&mut Names, OsString) {
        let parent = self.find(path.parent().expect("a parent"));
        let Node::Dir { now, .. } = &mut self.0[parent] else {
            panic!("{}: no directory", path.display())
        };
        (now, path.file_name().expect("a name").to_owned())
    }

    fn name(&mut self, path: &Path, id: usize) {
        let (names, name) = self.names(path);
        names.insert(name, id);
    }

    fn take(&mut self, path: &Path) -> usize {
        let (names, name) = self.names(path);
        names.remove(&name).unwrap_or_else(|| {
            panic!("{} was made in a step that was not recorded", path.display())
        })
    }

    /// Does a step. Returns the file and its content if the step makes the content known.
    fn apply(&mut self, step: &Step) -> Option<(usize, Content)> {
        match step {
            Step::Create(path) => {
                let id = self.add(Node::File { durable: Arc::default(), dirty: false });
                self.name(path, id);
            }
            Step::MakeDir(path) => {
                let id = self.add(empty_dir());
                self.name(path, id);
            }
            Step::Symlink(text, path) => {
                let id = self.add(Node::Link(text.clone()));
                self.name(path, id);
            }
            Step::Link(from, to) => {
                let id = self.find(from);
                self.name(to, id);
            }
            Step::Rename(from, to) => {
                let id = self.take(from);
                self.name(to, id);
            }
            Step::Remove(path) => drop(self.take(path)),
            Step::Write(path) => {
                let id = self.find(path);
                let Node::File { dirty, .. } = &mut self.0[id] else {
                    panic!("{}: no file", path.display())
                };
                *dirty = true;
            }
            Step::Sync(path, content) => {
                let id = self.find(path);
                self.0[id] = Node::File { durable: content.clone(), dirty: false };
                return Some((id, content.clone()));
            }
            Step::SyncDir(path) => {
                let id = self.find(path);
                let Node::Dir { durable, now } = &mut self.0[id] else {
                    panic!("{}: no directory", path.display())
                };
                durable.clone_from(now);
            }
        }
        None
    }

    fn tree(&self, at: usize, file: &mut impl FnMut(usize) -> Content, all_names: bool) -> Tree {
        let Node::Dir { durable, now } = &self.0[at] else { unreachable!() };
        let mut tree = Tree::new();
        for (name, id) in if all_names { now } else { durable } {
            let path = PathBuf::from(name);
            match &self.0[*id] {
                Node::Link(text) => drop(tree.insert(path, Entry::Link(text.clone()))),
                Node::File { .. } => drop(tree.insert(path, Entry::File(*id, file(*id)))),
                Node::Dir { .. } => {
                    let below = self.tree(*id, file, all_names);
                    tree.extend(below.into_iter().map(|(below, entry)| (path.join(below), entry)));
                    tree.insert(path, Entry::Dir);
                }
            }
        }
        tree
    }

    /// All current names, with the durable contents.
    pub fn now(&self) -> Tree {
        let mut durable = |id: usize| match &self.0[id] {
            Node::File { durable, .. } => durable.clone(),
            _ => unreachable!(),
        };
        self.tree(0, &mut durable, true)
    }

    /// What is left if the power is cut after `done` steps.
    fn after_cut(&self, loss: Loss, done: usize, future: &Future) -> Tree {
        let mut content = |id: usize| {
            let Node::File { durable, dirty } = &self.0[id] else { unreachable!() };
            let next = future
                .get(&id)
                .and_then(|all| all.iter().find(|(at, _)| *at >= done))
                .map(|(_, content)| content);
            match (loss, next) {
                (Loss::Nothing, Some(next)) if *dirty => next.clone(),
                (Loss::HalfOfContents, Some(next)) if *dirty => {
                    let half = next.len() / 2;
                    Arc::new([&next[..half], durable.get(half..).unwrap_or_default()].concat())
                }
                _ => durable.clone(),
            }
        };
        self.tree(0, &mut content, loss != Loss::Everything)
    }
}

fn empty_dir() -> Node {
    Node::Dir { durable: Names::new(), now: Names::new() }
}

/// Files written by the supervisor or QEMU, which are not traced.
const UNTRACED_FILES: [&str; 5] =
    ["console.log", "events.jsonl", "exit.json", "qemu.log", "supervisor.log"];

/// A power cut.
pub struct Cut {
    /// The number of steps that were done.
    pub done: usize,
    /// Whether the call had done all steps and answered.
    pub answered: bool,
    /// The kind of loss.
    pub loss: Loss,
    /// The content that is left.
    pub tree: Tree,
}

/// Every state that a power cut can leave of a call that began with `before` and did `steps`.
/// Panics if the steps do not lead to the content of `root`: then the recorder missed a step.
pub fn cuts(before: &FilesystemModel, steps: &[Step], root: &Path) -> Vec<Cut> {
    let future = future(before.clone(), steps, root);
    let (mut disk, mut seen, mut cuts) = (before.clone(), BTreeSet::new(), Vec::new());
    for done in 0..=steps.len() {
        if let Some(last) = done.checked_sub(1) {
            disk.apply(&steps[last]);
        }
        let answered = done == steps.len();
        for loss in Loss::ALL {
            let tree = disk.after_cut(loss, done, &future);
            // After the answer, the checks are stricter.
            if seen.insert((tree.clone(), answered)) {
                cuts.push(Cut { done, answered, loss, tree });
            }
        }
    }
    cuts
}

fn future(mut disk: FilesystemModel, steps: &[Step], root: &Path) -> Future {
    let mut future = Future::new();
    for (index, step) in steps.iter().enumerate() {
        if let Some((id, content)) = disk.apply(step) {
            future.entry(id).or_default().push((index, content));
        }
    }
    let is_ours = |path: &Path| !UNTRACED_FILES.iter().any(|other| path.ends_with(other));
    let (ours, real) = (disk.now(), FilesystemModel::of(root).now());
    let names =
        |tree: &Tree| -> Vec<_> { tree.keys().filter(|path| is_ours(path)).cloned().collect() };
    assert_eq!(
        names(&ours),
        names(&real),
        "a name was made or removed in a step that was not recorded"
    );
    for (path, entry) in ours.iter().filter(|(path, _)| is_ours(path)) {
        if let (Entry::File(id, durable), Entry::File(_, content)) = (entry, &real[path]) {
            let Node::File { dirty, .. } = disk.0[*id] else { unreachable!() };
            assert!(
                dirty || durable == content,
                "{} was written in a step that was not recorded",
                path.display()
            );
            future.entry(*id).or_default().push((steps.len(), content.clone()));
        }
    }
    future
}

/// Replaces the content of `root` by `tree`. Files are an hour old, as after a reboot.
pub fn restore(tree: &Tree, root: &Path) {
    for entry in fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            fs::remove_dir_all(entry).unwrap();
        } else {
            fs::remove_file(entry).unwrap();
        }
    }
    let mut written = BTreeMap::new();
    for (path, entry) in tree {
        let path = root.join(path);
        match entry {
            Entry::Dir => fs::create_dir(&path).unwrap(),
            Entry::Link(text) => symlink(text, &path).unwrap(),
            Entry::File(id, content) => match written.get(id) {
                Some(other) => fs::hard_link(other, &path).unwrap(),
                None => {
                    write(&path, content);
                    written.insert(id, path);
                }
            },
        }
    }
}

fn write(path: &Path, content: &[u8]) {
    let mut file = File::create(path).unwrap();
    let data = content.len() - content.iter().rev().take_while(|byte| **byte == 0).count();
    file.write_all(&content[..data]).unwrap();
    file.set_len(content.len() as u64).unwrap();
    file.set_permissions(Permissions::from_mode(0o600)).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
}
