#!/usr/bin/env bash
# Would the tests notice a wrong version of the code? Each of some 120 mutants, one changed line of exchange/,
# exchange/wire/, optim/, text/, checkpoint/ or trainer/, is put into a copy of the tree, and the tests that name the
# part are run there until the first fails. The mutants stand in tests/mutants.py.
#
#   jobs/bench/mutants.sh [PART ...]       a part is the beginning of a file's name: optim/ exchange/acco.py
#
# It prints a line for each and a summary, and returns 1 unless every mutant is dead: one that survived needs a test,
# one that is not applicable has to follow the code. One process; some minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
exec nice python tests/mutants.py "$@"
