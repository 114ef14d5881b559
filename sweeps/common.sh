# shellcheck shell=bash
# What the sweeps have in common. Each sources this file, names its FLAGS, defines a function grid that calls train or
# throughput once for each run, and ends with: sweep "$@".
#
#   sweeps/NAME.sh [--dry-run] [--retry-failed] [FLAGS of every run]
#   sweeps/NAME.sh --count              how many runs there are
#   sweeps/NAME.sh --run N FLAGS        only the Nth of them, as sweeps/slurm_array.sbatch does
#
# By environment variables, besides the grid's own:
#   CSV                file with a row for each run (runs/sweeps/NAME.csv); the runs' folders are beside it
#   PYTHON             interpreter (python)
#   KEEP_CHECKPOINTS   1: keep the runs' checkpoints, which are deleted otherwise when the row is written
#
# Relative paths start at the repository. docs/sweeps.md says when a run counts as done, and what the columns are.

NAME=$(basename "$0" .sh)
CSV=${CSV:-runs/sweeps/$NAME.csv}
PYTHON=${PYTHON:-python}
SECONDS_A_STAGE=${SECONDS_A_STAGE:-2}  # of throughput.py's measuring; its own default is 12

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
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
    local options=() pass=count number=0 total="" only="" failed=0 busy="" count="" dry_run=""
    [ "${KEEP_CHECKPOINTS:-}" != 1 ] || options+=(--keep-checkpoints)
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) options+=("$1") dry_run=yes ;;
            --retry-failed) options+=("$1") ;;
            --count) count=yes ;;
            --run) only=${2:?--run: give the number of a run}; shift ;;
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
    if [ -n "$only" ] && ! [[ "$only" =~ ^[0-9]+$ && "$only" -ge 1 && "$only" -le "$total" ]]; then
        echo "error: --run $only: there are runs 1 to $total" >&2
        exit 2
    fi
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
