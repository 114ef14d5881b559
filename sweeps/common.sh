# shellcheck shell=bash
# What the sweeps have in common. Each sources this file, names its FLAGS, has its variables checked, defines a function grid
# that calls train or throughput once for each run, and ends with: sweep "$@".
#
#   sweeps/NAME.sh [--dry-run] [--retry-failed] [FLAGS of every run]
#   sweeps/NAME.sh --count              how many runs there are
#   sweeps/NAME.sh --run N FLAGS        only the Nth of them, as sweeps/slurm_array.sbatch does
#
# Environment variables, besides the grid's own:
#   CSV                file with one row per run (runs/sweeps/NAME.csv); the runs' folders are beside it
#   PYTHON             interpreter (python)
#   KEEP_CHECKPOINTS   1: keep the runs' checkpoints; otherwise they are deleted when the row is written
#
# Relative paths start at the repository. docs/sweeps.md says when a run counts as done, and what the columns are.

set -f         # the words of a variable are values: * is no list of files
unset CDPATH   # cd would look there first, and print where it went

NAME=$(basename -- "$0" .sh)
CSV=${CSV:-runs/sweeps/$NAME.csv}
PYTHON=${PYTHON:-python}
SECONDS_A_STAGE=${SECONDS_A_STAGE:-2}  # of throughput.py's measuring; its own default is 12

# VARIABLE REASON: end with one sentence.
refuse() {
    printf 'error: %s=%q: %s\n' "$1" "${!1-}" "$2" >&2
    exit 2
}

is_whole() {
    case $1 in '' | *[!0123456789]* | 0?* | ??????????*) return 1 ;; esac
}

# VARIABLE…: each is a list of whole numbers above 0. In arithmetic, bash would run what else stands there, as a[$(command)].
counts() {
    local variable word
    lists "$@"
    for variable in "$@"; do
        for word in ${!variable}; do
            if ! is_whole "$word" || [ "$word" = 0 ]; then
                refuse "$variable" "give whole numbers above 0"
            fi
        done
    done
}

# VARIABLE…: each is a list of numbers, as 0.01 or 1e-3.
numbers() {
    local variable word
    lists "$@"
    for variable in "$@"; do
        for word in ${!variable}; do
            [[ $word =~ ^-?[0123456789]*[.]?[0123456789]+(e-?[0123456789]+)?$ ]] || refuse "$variable" "give numbers"
        done
    done
}

# VARIABLE…: each is a list of values. A flag among them would be one of another program's.
lists() {
    local variable word
    for variable in "$@"; do
        [ -n "${!variable//[[:space:]]/}" ] || refuse "$variable" "give values, with spaces between them"
        for word in ${!variable}; do
            case $word in -*[!0123456789.e-]* | --* | -) refuse "$variable" "give values, not flags" ;; esac
        done
    done
}

train() { run train.py "$@"; }
throughput() { run profile/throughput.py --seconds "$SECONDS_A_STAGE" "$@"; }

# One point of the grid: the program, and what is special about the run. How it is walked:
#   pass=count    nothing but that
#   pass=check    wrong flags end the sweep, before its first run
#   pass=run      all runs, or the one that --run names
#   pass=wait     those at which another process was: its row counts, and where it leaves none the run is made here
run() {
    number=$((number + 1))
    if [ "$pass" = count ] || [ "${only:-$number}" != "$number" ] || [[ $pass = wait && $busy != *" $number "* ]]; then
        return
    fi
    local label=${*:2} status=0
    label=${label//--/} label=${label#seconds "$SECONDS_A_STAGE" }
    local command=("$PYTHON" profile/sweep.py --csv "$CSV" --program "$1" --python "$PYTHON" --label "$label"
        --place "$number/$total" "${options[@]}" "${FLAGS[@]}" "${@:2}")
    if [ "$pass" = check ]; then
        "${command[@]}" --dry-run >/dev/null
        return
    fi
    if [ "$pass" = wait ]; then
        command+=(--wait)
    fi
    [ -z "$only" ] || exec "${command[@]}" --wait  # exec so that a signal to this process reaches it
    "${command[@]}" || status=$?
    case $status in
        0) ;;
        1) failed=$((failed + 1)) ;;  # it has a row that says why
        3) busy+=" $number " ;;
        *) exit "$status" ;;
    esac
}

sweep() {
    cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
    case $SECONDS_A_STAGE in
        *[!0123456789.]* | *.*.* | . | "") refuse SECONDS_A_STAGE "give a number of seconds" ;;
    esac
    local options=() pass=count number=0 total="" only="" failed=0 busy="" count="" dry_run=""
    [ "${KEEP_CHECKPOINTS:-}" != 1 ] || options+=(--keep-checkpoints)
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) options+=("$1") dry_run=yes ;;
            --retry-failed) options+=("$1") ;;
            --count) count=yes ;;
            --run)
                [ -n "${2:-}" ] || { echo "error: --run: give the number of a run" >&2; exit 2; }
                only=$2
                shift
                ;;
            --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "sweeps/$NAME.sh"; exit ;;
            *) break ;;
        esac
        shift
    done
    [ $# -eq 0 ] || FLAGS=("$@")
    grid
    total=$number number=0
    if [ -n "$count" ]; then
        echo "$total"
        exit
    fi
    if [ -n "$only" ] && ! { is_whole "$only" && [ "$only" -ge 1 ] && [ "$only" -le "$total" ]; }; then
        printf 'error: --run %q: there are runs 1 to %s\n' "$only" "$total" >&2
        exit 2
    fi
    command -v -- "$PYTHON" >/dev/null || refuse PYTHON "no such program; name a Python that has the requirements"
    if [ -z "$dry_run$only" ]; then
        pass=check
        grid
        number=0
    fi
    pass=run
    grid
    if [ -n "$busy" ]; then
        pass=wait number=0
        grid
    fi
    if [ -z "$dry_run$only" ]; then
        "$PYTHON" profile/report.py "$CSV"
    fi
    [ "$failed" -eq 0 ] || exit 1
}
