# shellcheck shell=bash
# What it takes to compile for the machine: a linker with a libc, and Rust's standard library for aarch64.

LAB_TARGET=aarch64-unknown-linux-gnu

# Puts aarch64-linux-gnu-gcc on PATH: the system's when it has one that links, else one of our own.
cross_compiler() {
    local probe=$LAB_RUN/cross-probe
    if ! command -v aarch64-linux-gnu-gcc >/dev/null ||
        ! aarch64-linux-gnu-gcc -static -x c -o "$probe" - <<<'int main(void) { return 0; }' 2>/dev/null; then
        local cross
        cross=$(cached cross)
        export PATH=$cross/bin:$PATH
    fi
}

# The environment in which cargo builds static programs for the machine, and in $LAB_CARGO_FLAGS what to tell it. They are static so that
# the machine needs no libraries.
cross_environment() {
    cross_compiler
    export CARGO_BUILD_TARGET=$LAB_TARGET
    # One for each checkout: cargo would take the crates of another one, at the same relative paths, for these.
    CARGO_TARGET_DIR=$LAB_CACHE/target-$(printf '%s' "$LAB_ROOT" | sha256sum | cut -c 1-12)
    export CARGO_TARGET_DIR
    mkdir -p "$CARGO_TARGET_DIR"
    touch "$CARGO_TARGET_DIR" # cache_prune goes by it
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
    # Quick to build, and quick enough where every instruction is emulated.
    export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OPT_LEVEL=2 \
        CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_PROFILE_RELEASE_INCREMENTAL=true

    local sysroot library
    sysroot=$(rustc --print sysroot)
    LAB_CARGO_FLAGS=()
    if [ -d "$sysroot/lib/rustlib/$LAB_TARGET/lib" ]; then
        return
    fi
    LAB_CARGO_FLAGS=(-Zbuild-std=std,panic_unwind)
    export RUSTC_BOOTSTRAP=1
    library=$sysroot/lib/rustlib/src/rust/library
    if [ ! -e "$library/Cargo.lock" ]; then
        library=$(cached rust-src "$(rustc --version | cut -d ' ' -f 2)")/library
        export __CARGO_TESTS_ONLY_SRC_ROOT=$library
    fi
}
