"""Tokenize text files into a Megatron data set: python tools/make_indexed.py PREFIX FILE_OR_FOLDER... [--tokenizer JSON]."""

import argparse
import sys
from pathlib import Path

import numpy as np

from pipehc.data.text import read_documents
from pipehc.data.tokenizer import open_tokenizer
from pipehc.megatron.trainer.data import write_indexed


def main() -> None:
    parser = argparse.ArgumentParser(description="Write PREFIX.bin and PREFIX.idx for `data.kind: megatron`.")
    parser.add_argument("prefix", type=Path)
    parser.add_argument("paths", nargs="*", help="files and folders of text; none: the interpreter's standard library")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or the path of a Hugging Face tokenizers JSON file")
    parser.add_argument("--end-of-document", metavar="TOKEN", help="of a JSON file; default: the one that it names itself")
    parser.add_argument("--suffixes", nargs="+", default=[".py", ".txt", ".md"])
    arguments = parser.parse_args()
    try:
        tokenizer = open_tokenizer(arguments.tokenizer, arguments.end_of_document)
        documents, skipped = read_documents(arguments.paths, arguments.suffixes)
        end = np.array([] if tokenizer.end_of_document is None else [tokenizer.end_of_document], dtype=np.int64)
        tokens = (np.append(ids, end) for ids in tokenizer.encode(document.content for document in documents))
        written = write_indexed(tokens, arguments.prefix, tokenizer.vocab_size)
    except ValueError as error:
        sys.exit(str(error))
    if tokenizer.end_of_document is None:
        print("documents are joined without a token between them: the tokenizer names none; --end-of-document can")
    print(f"{arguments.prefix}: {len(documents)} documents, {written} tokens, vocabulary {tokenizer.vocab_size}, "
          f"{len(skipped)} files skipped")


if __name__ == "__main__":
    main()
