"""Compiles a regular expression to an automaton over tokens: `python -m diffusify.text.regex_worker SECONDS`.

It runs as a process of its own with limits on processor time (SECONDS) and memory, since a short expression can
exceed those of any machine.
"""

import json
import sys
from array import array

MAX_SECONDS, MAX_BYTES, MAX_EDGES = 10, 4 * 2**30, 10_000_000


def main() -> None:
    """Compile the expression given on standard input, and write the automaton to standard output.

    Input: `{"regex": ..., "end": end token id, "vocabulary": [[hex bytes, token ids], ...]}`. Output: a line of JSON,
    `{"start": ..., "final": [...], "states": [[state, number of edges], ...]}`, then the tokens of all edges as 32-bit
    integers and their target states as 64-bit integers. On an error the message goes to standard error.
    """
    _set_limits(int(sys.argv[1]))
    from outlines_core import Index, Vocabulary

    request = json.load(sys.stdin)
    vocabulary = {bytes.fromhex(token): ids for token, ids in request["vocabulary"]}
    try:
        index = Index(request["regex"], Vocabulary(request["end"], vocabulary))
    except (ValueError, OverflowError) as error:
        sys.exit(str(error))
    start = index.get_initial_state()
    states, tokens, targets = {start: 0}, array("i"), array("q")
    queue = [start]
    for state in queue:
        allowed = sorted(token for token in index.get_allowed_tokens(state) or [] if token != request["end"])
        states[state] = len(allowed)
        tokens.extend(allowed)
        next_states = [index.get_next_state(state, token) for token in allowed]
        targets.extend(next_states)
        if len(tokens) > MAX_EDGES:
            sys.exit(f"its automaton has over {MAX_EDGES} edges; simplify the expression")
        for target in dict.fromkeys(next_states):
            if target not in states:
                states[target] = 0
                queue.append(target)
    final = [state for state in states if index.is_final_state(state)]
    header = {"start": start, "final": final, "states": list(states.items())}
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + tokens.tobytes() + targets.tobytes())


def _set_limits(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows does not have it; the caller's timeout applies
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


if __name__ == "__main__":
    main()
