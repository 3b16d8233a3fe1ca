# The virtual environment of a checkout: found, made, filled, and left alone while nothing changed.
# Sourced by scripts/quickstart, scripts/test and .ci/run; runs on bash 3.2 and needs only Python >= 3.11.
#
#   prepare_environment serve|all     makes $ROOT/.venv with the package (editable) and that extra
#
# HEADRACE_PYTHON=python3.12   the interpreter to use
# HEADRACE_ALLOW_CUDA=1        take a CUDA build of torch (several GB) although no GPU was found

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON_IN_VENV=$VENV/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

fail() {
    printf '\n' >&2
    printf '%s\n' "$@" >&2
    exit 1
}

has_gpu() {
    [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
}

# Prints the first interpreter that is new enough and can make a virtual environment.
find_python() {
    local candidate version without_venv=""
    for candidate in ${HEADRACE_PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2]) if sys.version_info >= (3, 11) else sys.exit(1)' 2>/dev/null) || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv="${without_venv:-$version}"
    done
    if [ -n "$without_venv" ]; then
        fail "Python $without_venv is here, but it cannot make virtual environments: its venv module is not installed." \
            "On Debian and Ubuntu:  sudo apt-get install python$without_venv-venv   (then run this again)"
    fi
    fail "Headrace needs Python 3.11 or newer, and none was found (tried: ${HEADRACE_PYTHON:-python3 python3.13 python3.12 python3.11 python})." \
        "On Debian and Ubuntu:  sudo apt-get install python3 python3-venv" \
        "An interpreter elsewhere:  HEADRACE_PYTHON=/path/to/python3.12 $0"
}

# What the environment was made from; when it changes, it is brought up to date.
fingerprint() {
    "$PYTHON_IN_VENV" -c '
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
print(hashlib.sha256((root / "setup.py").read_bytes() + f"{root} {sys.version}".encode()).hexdigest())' "$ROOT"
}

# run_step WHAT COMMAND...: shows what the command is at, keeps its output in the log, shows the end of it on failure.
run_step() {
    local what=$1 log=$VENV/install.log started=$SECONDS shown=$SECONDS line code=0
    shift
    say "  $what"
    : >"$log"
    set +e
    "$@" 2>&1 | tee "$log" | while IFS= read -r line; do
        case $line in Collecting* | *Downloading* | *Building* | *Installing* | *Preparing* | *Processing*) ;; *) continue ;; esac
        line=${line#"${line%%[![:space:]]*}"}
        line=${line%%: *}
        if [ -t 2 ]; then
            printf '\r\033[K    %4d s  %.60s' $((SECONDS - started)) "$line" >&2
        elif [ $((SECONDS - shown)) -ge 5 ]; then
            printf '    %4d s  %.100s\n' $((SECONDS - started)) "$line" >&2
            shown=$SECONDS
        fi
    done
    code=${PIPESTATUS[0]}
    set -e
    [ -t 2 ] && printf '\r\033[K' >&2
    [ "$code" -eq 0 ] && return
    [ "$code" -ge 128 ] && exit "$code"
    say "" "$what failed; the end of $log:"
    grep -v '^WARNING: Location' "$log" | tail -n 15 >&2
    fail "Is the network up, and the disk not full (about 3 GB are needed)? After that, run this again: it goes on from here."
}

install_torch() {
    "$PYTHON_IN_VENV" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && return
    if has_gpu || [ -n "${HEADRACE_ALLOW_CUDA:-}" ]; then
        return # pip's own choice, with CUDA
    fi
    local arguments
    say "  no GPU found: looking for the CPU build of torch"
    arguments=$("$PYTHON_IN_VENV" "$ROOT/scripts/choose_torch.py") || exit 1
    # shellcheck disable=SC2086  # several words are meant
    run_step "installing ${arguments%% *} for the CPU" "$PYTHON_IN_VENV" -m pip install $arguments
}

make_environment() {
    local extra=$1 python
    if ! "$PYTHON_IN_VENV" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        say "Making a virtual environment in .venv with $("$python" --version) (once, about two minutes)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || fail "$python could not make $VENV; see above."
    else
        say "Bringing .venv up to date"
    fi
    install_torch
    run_step "installing headrace[$extra] and what it needs" "$PYTHON_IN_VENV" -m pip install --editable "$ROOT[$extra]"
    fingerprint >"$VENV/headrace-$extra"
    # The larger extra contains the smaller one.
    if [ "$extra" = all ]; then cp "$VENV/headrace-all" "$VENV/headrace-serve"; fi
    say "  ready in $SECONDS s"
}

is_current() {
    [ -x "$PYTHON_IN_VENV" ] && [ -f "$VENV/headrace-$1" ] && [ "$(fingerprint)" = "$(cat "$VENV/headrace-$1")" ]
}

prepare_environment() {
    if [ ! -L "$ROOT/headrace/broker" ] && [ ! -d "$ROOT/headrace/broker" ]; then
        fail "headrace/broker should be a symbolic link, but in this checkout it is a plain file." \
            "Clone again on a file system with symbolic links, with:  git clone -c core.symlinks=true ..."
    fi
    is_current "$1" && return
    (
        # Two scripts started at once must not install over each other.
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        is_current "$1" || make_environment "$1"
    ) 9<"$ROOT"
}
