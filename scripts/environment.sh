# The virtual environment of a checkout: found, made, filled, and left alone while nothing changed.
# Sourced by scripts/quickstart, scripts/test and .ci/run; runs on bash 3.2 and needs only Python >= 3.11.
#
#   prepare_environment serve|all     makes $ROOT/.venv with the package (editable) and that extra
#
# HEADRACE_PYTHON=python3.12   the interpreter to use
# HEADRACE_ALLOW_CUDA=1        take a CUDA build of torch (several GB) although no GPU was found

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
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
    local candidates=(python3 python3.13 python3.12 python3.11 python)
    if [ -n "${HEADRACE_PYTHON:-}" ]; then candidates=("$HEADRACE_PYTHON"); fi
    for candidate in "${candidates[@]}"; do
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
    fail "Headrace needs Python 3.11 or newer, and none was found (tried: ${candidates[*]})." \
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

# The last thing that pip said it does, without the versions it weighed.
latest_step() {
    grep -E '^ *(Collecting|Obtaining|Downloading|Building|Installing|Preparing|Processing|Attempting)' "$1" 2>/dev/null |
        tail -n 1 | sed -e 's/^ *//' -e 's/: .*//' -e 's/ from .*//'
}

# Shows what a log is at, every second on a terminal and every five elsewhere, until it is killed or the script ends.
show_progress() {
    local started=$SECONDS seconds line
    # The pause keeps nothing open for those who wait for the end of our output.
    while sleep 1 9<&- >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        seconds=$((SECONDS - started))
        line=$(latest_step "$1")
        if [ -t 2 ]; then
            printf '\r\033[K    %4d s  %.60s' "$seconds" "$line" >&2
        elif [ $((seconds % 5)) -eq 0 ]; then
            printf '    %4d s  %.100s\n' "$seconds" "$line" >&2
        fi
    done
}

# run_step WHAT COMMAND...: shows what the command is at, keeps its output in the log, shows the end of it on failure.
run_step() {
    local what=$1 log=$VENV/install.log ticker code=0
    shift
    say "  $what"
    : >"$log"
    show_progress "$log" &
    ticker=$!
    "$@" >"$log" 2>&1 || code=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    if [ "$code" -eq 0 ]; then return; fi
    if [ "$code" -ge 128 ]; then exit "$code"; fi
    say "" "$what failed; the end of $log:"
    grep -v '^WARNING: Location' "$log" | tail -n 15 >&2 || true
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

# The programs in a virtual environment hold its path, so one that was moved or copied is of no use.
was_moved() {
    local made_at
    made_at=$(sed -n 's/^command = .* -m venv //p' "$VENV/pyvenv.cfg" 2>/dev/null) || return 1
    case $made_at in "" | *"$VENV") return 1 ;; esac
}

make_environment() {
    local extra=$1 python
    if was_moved || ! "$PYTHON_IN_VENV" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        say "Making a virtual environment in .venv with $("$python" --version) (once, about two minutes)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || fail "$python could not make $VENV; see above."
    else
        say "Bringing .venv up to date"
    fi
    install_torch
    run_step "installing headrace[$extra] and what it needs" "$PYTHON_IN_VENV" -m pip install --editable "${ROOT}[$extra]"
    fingerprint >"$VENV/headrace-$extra"
    # The larger extra contains the smaller one.
    if [ "$extra" = all ]; then cp "$VENV/headrace-all" "$VENV/headrace-serve"; fi
    say "  ready in $SECONDS s"
}

is_current() {
    [ -x "$PYTHON_IN_VENV" ] && [ -x "$VENV/bin/headrace" ] && [ -f "$VENV/headrace-$1" ] &&
        [ "$(fingerprint)" = "$(cat "$VENV/headrace-$1")" ]
}

prepare_environment() {
    if [ ! -L "$ROOT/headrace/broker" ] && [ ! -d "$ROOT/headrace/broker" ]; then
        fail "headrace/broker should be a symbolic link, but in this checkout it is a plain file." \
            "Clone again on a file system with symbolic links, with:  git clone -c core.symlinks=true ..."
    fi
    is_current "$1" && return
    (
        trap 'exit 130' INT # pip ends a Ctrl-C like any failure
        # Two scripts started at once must not install over each other.
        if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
            say "Waiting for another script that prepares .venv"
            flock 9
        fi
        is_current "$1" || make_environment "$1"
    ) 9<"$ROOT"
}
