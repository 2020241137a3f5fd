//! Embeds what `windlass plugin new` writes: the templates of projects, the kit for authors in source, and the contract.
//!
//! Whole directories, so that a file that is added there is embedded too; cargo watches them.

use std::{
    env,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = here.join("../..").canonicalize()?;
    let mut text = String::new();
    for (name, directory) in [
        ("TEMPLATES", here.join("templates/plugin")),
        ("SDK", root.join("sdk")),
        ("WIT", root.join("wit")),
    ] {
        println!("cargo::rerun-if-changed={}", directory.display());
        let mut files = Vec::new();
        collect(&directory, &directory, &mut files)?;
        files.sort();
        writeln!(
            text,
            "/// Path and text of each file.\npub(super) static {name}: &[(&str, &str)] = &["
        )?;
        for (path, file) in files {
            writeln!(text, "    ({path:?}, include_str!({file:?})),")?;
        }
        writeln!(text, "];")?;
    }

    // The kit's dependencies as the workspace has them: one place names versions.
    let manifest = root.join("Cargo.toml");
    println!("cargo::rerun-if-changed={}", manifest.display());
    let manifest = fs::read_to_string(manifest)?;
    writeln!(
        text,
        "/// Dependencies of the kit, and what the workspace says of their versions."
    )?;
    writeln!(text, "pub(super) static DEPENDENCIES: &[(&str, &str)] = &[")?;
    for name in ["wit-bindgen", "serde", "serde_json"] {
        let wanted = manifest
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='))
            .map(|line| {
                line.split_once(" #")
                    .map_or(line, |(value, _)| value)
                    .trim()
            })
            .ok_or_else(|| format!("Cargo.toml names no version of {name}"))?;
        writeln!(text, "    ({name:?}, {wanted:?}),")?;
    }
    writeln!(text, "];")?;
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("embedded.rs"),
        text,
    )?;
    Ok(())
}

fn collect(base: &Path, directory: &Path, files: &mut Vec<(String, String)>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(base, &path, files)?;
        } else {
            let relative = path.strip_prefix(base).map_err(io::Error::other)?;
            files.push((relative.display().to_string(), path.display().to_string()));
        }
    }
    Ok(())
}
