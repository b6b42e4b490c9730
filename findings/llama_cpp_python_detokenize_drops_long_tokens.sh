#!/usr/bin/env bash
# llama-cpp-python 0.3.36: Llama.detokenize drops every token of more than 32 bytes, without an error.
#
# It hands llama.cpp's llama_token_to_piece a buffer of 32 bytes. Where a token does not fit, that function returns minus
# the bytes that it needs, and the slice buffer[:negative] is empty. Real vocabularies have such tokens, for example deep
# indentations. Seen on Linux, Python 3.11, with a vocabulary of four words made here: tokens of 31 and 32 bytes come back
# whole, of 33 and 40 bytes comes b"". llama_token_to_piece with a buffer of 64 bytes gives all four.
#
# Builds the package from source, as PyPI has no binary: some five minutes of one core, a C++ compiler. Fails if a token of
# more than 32 bytes comes back, or one of at most 32 does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.2
"$folder/venv/bin/python" - "$folder/vocabulary.gguf" <<'PYTHON'
import ctypes
import sys

import llama_cpp
from gguf import GGUFWriter, TokenType

words = {length: b"x" * length for length in (31, 32, 33, 40)}
special = [(b"<unk>", TokenType.UNKNOWN), (b"<s>", TokenType.CONTROL), (b"</s>", TokenType.CONTROL)]
tokens = special + [(word, TokenType.NORMAL) for word in words.values()]
writer = GGUFWriter(sys.argv[1], "llama")
writer.add_tokenizer_model("llama")
writer.add_token_list([word for word, _ in tokens])
writer.add_token_scores([0.0] * len(tokens))
writer.add_token_types([kind for _, kind in tokens])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
print(f"llama-cpp-python {llama_cpp.__version__}")
for token, (length, word) in enumerate(words.items(), len(special)):
    buffer = ctypes.create_string_buffer(64)
    size = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, 64, 0, False)
    assert buffer.raw[:size] == word, "llama.cpp itself does not know the token"
    came = llama.detokenize([token])
    print(f"token of {length} bytes: {came!r}")
    assert came == (word if length <= 32 else b""), "tokens of more than 32 bytes are not dropped any more"
PYTHON
