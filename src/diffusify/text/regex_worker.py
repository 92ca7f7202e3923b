"""Makes a regular expression's automaton over tokens, in a process of its own: `python -m diffusify.text.regex_worker`.

An expression of a few letters can need more time and memory than there is; here it can be stopped.
"""

import json
import sys
from array import array

SECONDS, BYTES, EDGES = 10, 4 * 2**30, 10_000_000


def main() -> None:
    """From standard input `{"regex": ..., "end": ..., "words": [[hex bytes, token ids], ...]}`.

    To standard output a line of JSON, `{"start": ..., "final": [...], "states": [[state, edges], ...]}`, and then all
    edges' tokens and all their targets as 32-bit numbers.
    """
    _limit()
    from outlines_core import Index, Vocabulary

    asked = json.load(sys.stdin)
    words = {bytes.fromhex(word): ids for word, ids in asked["words"]}
    try:
        index = Index(asked["regex"], Vocabulary(asked["end"], words))
    except (ValueError, OverflowError) as error:
        sys.exit(str(error))
    start = index.get_initial_state()
    states, tokens, targets = {start: 0}, array("i"), array("q")
    queue = [start]
    for state in queue:
        ways = sorted(token for token in index.get_allowed_tokens(state) or [] if token != asked["end"])
        states[state] = len(ways)
        tokens.extend(ways)
        reached = [index.get_next_state(state, token) for token in ways]
        targets.extend(reached)
        if len(tokens) > EDGES:
            sys.exit(f"it allows so much that it needs over {EDGES} edges")
        for target in dict.fromkeys(reached):
            if target not in states:
                states[target] = 0
                queue.append(target)
    final = [state for state in states if index.is_final_state(state)]
    head = {"start": start, "final": final, "states": list(states.items())}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + tokens.tobytes() + targets.tobytes())


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where there is the time limit alone
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


if __name__ == "__main__":
    main()
