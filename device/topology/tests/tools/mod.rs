//! Runs `iasl` and `dtc` where they are installed.

use std::{
    env, fs,
    io::{ErrorKind, Write as _, stderr},
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Set to make a tool that is not installed a failure: for a machine that is meant to have them.
const REQUIRE: &str = "VIOMMU_REQUIRE_TOOLS";

/// Says why `test` did not check all that it could. Written past the test harness, which shows what a
/// passing test prints only on request.
pub(crate) fn skip(test: &str, reason: &str) {
    stderr().write_all(format!("skipped: {test}: {reason}\n").as_bytes()).unwrap();
}

/// An empty folder for the files of `test`.
pub(crate) fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("topology").join(test);
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Runs `tool` in `folder`; it must succeed. `None`, with the reason printed, if it is not installed.
pub(crate) fn run(test: &str, folder: &Path, tool: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new(tool).args(arguments).current_dir(folder).output() {
        Ok(output) => {
            assert!(output.status.success(), "{tool} {arguments:?}: {output:?}");
            Some(output)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            assert!(env::var_os(REQUIRE).is_none(), "{tool} is not installed and {REQUIRE} is set");
            skip(test, &format!("{tool} is not installed"));
            None
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}
