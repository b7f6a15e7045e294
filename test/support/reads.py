"""How much of a checkpoint is read."""

from nxdi_deepseek.checkpoint import reader


def count_reads(monkeypatch):
    """A list that gets the bytes of each read of tensors from here on."""
    original, counts = reader.pread_into, []

    def counted(descriptor, buffer, *args):
        counts.append(buffer.nbytes)
        original(descriptor, buffer, *args)

    monkeypatch.setattr(reader, "pread_into", counted)
    return counts
