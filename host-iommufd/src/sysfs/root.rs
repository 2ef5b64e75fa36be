use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// Where `/sys`, `/proc`, `/dev` and `/boot` are.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

/// What was found where something was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen<T> {
    /// This.
    Known(T),
    /// It does not exist.
    Absent,
    /// It exists, and could not be read or understood.
    Hidden {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

impl Root {
    /// This machine.
    pub fn here() -> Self {
        Self::at("/")
    }

    /// A tree that was made or copied, below `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// `path`, which begins with `/`, below this root.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether this is the machine that runs the program.
    pub fn is_here(&self) -> bool {
        self.0 == Path::new("/")
    }

    pub(super) fn text(&self, path: impl AsRef<Path>) -> Seen<String> {
        self.bytes(path).map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }

    pub(super) fn bytes(&self, path: impl AsRef<Path>) -> Seen<Vec<u8>> {
        Seen::of(std::fs::read(self.path(&path)), path.as_ref())
    }

    /// Names in a folder, sorted. Absent where there is no such folder.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Seen<Vec<String>> {
        let names = || -> io::Result<Vec<String>> {
            let entries = std::fs::read_dir(self.path(&path))?;
            let mut names = entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<_>>>()?;
            names.sort();
            Ok(names)
        };
        Seen::of(names(), path.as_ref())
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }

    /// Last part of what a link points to.
    pub(super) fn link_name(&self, path: impl AsRef<Path>) -> Option<String> {
        let target = std::fs::read_link(self.path(path)).ok()?;
        target.file_name().map(OsStr::to_string_lossy).map(Into::into)
    }
}

impl<T> Seen<T> {
    fn of(result: io::Result<T>, path: &Path) -> Self {
        match result {
            Ok(value) => Self::Known(value),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Absent,
            Err(error) => Self::Hidden { path: path.to_owned(), why: reason(&error) },
        }
    }

    /// What was found, if it was.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Absent | Self::Hidden { .. } => None,
        }
    }

    /// Whether it exists and was not seen.
    pub fn is_hidden(&self) -> bool {
        matches!(self, Self::Hidden { .. })
    }

    pub(super) fn map<U>(self, then: impl FnOnce(T) -> U) -> Seen<U> {
        match self {
            Self::Known(value) => Seen::Known(then(value)),
            Self::Absent => Seen::Absent,
            Self::Hidden { path, why } => Seen::Hidden { path, why },
        }
    }

    pub(super) fn into_known(self) -> Option<T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Absent | Self::Hidden { .. } => None,
        }
    }
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}
