"""What drafts and tokens must be on every backend."""


def assert_right(reference, prompts, rows, drafts):
    """Tokens are the model's greedy ones; drafts are the reference's, hidden states to 5e-6 of their largest entry."""
    for prompt, row in zip(prompts, rows, strict=True):
        assert row[len(prompt) :] == reference.greedy(prompt, len(row) - len(prompt))
    for known, drafted, hidden in drafts:
        for row, tokens, state in zip(known, drafted, hidden, strict=True):
            expected, expected_state = reference.draft(row, len(tokens))
            assert tokens == expected
            assert (state - expected_state).abs().max() <= 5e-6 * expected_state.abs().max()


def acceptance(prompts, rows, steps, length):
    """The share of drafted tokens that were accepted: each step adds one token more than that."""
    new = sum(len(row) - len(prompt) - 1 for prompt, row in zip(prompts, rows, strict=True))
    return (new - steps * len(rows)) / (steps * len(rows) * (length - 1))


def expected_counts(reference, prompts, new_tokens, length):
    """(steps, accepted drafts) of generations by the reference's drafts, up to `new_tokens` behind each prompt."""
    steps = accepted = 0
    for prompt in prompts:
        right = reference.greedy(prompt, new_tokens + length)
        made = 1
        while made < new_tokens:
            drafted, _ = reference.draft(prompt + right[:made], length - 1)
            kept = next((i for i, token in enumerate(drafted) if token != right[made + i]), len(drafted))
            steps, accepted, made = steps + 1, accepted + kept, made + kept + 1
    return steps, accepted
