"""Language models of a few kilobytes as folders, as `save_pretrained` leaves them and as they were published once."""

import torch


def write_tiny_llama(folder, words, **sizes):
    """A random Llama whose tokenizer knows <unk> and these words. Returns the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_published_t5(folder, lines):
    """A random T5 as T5's and UnifiedQA's repositories hold theirs: pytorch_model.bin, and for the tokenizer nothing
    but spiece.model, which is learnt from the lines. Returns the folder."""
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    # T5's tokenizer has 100 pieces of its own after those of the file.
    config = T5Config(vocab_size=160, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"], **sizes)
    config.save_pretrained(folder)
    torch.save(T5ForConditionalGeneration(config).state_dict(), folder / "pytorch_model.bin")
    return folder
