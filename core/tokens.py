from ..text.tokens import Decoder as Decoder, Tokenizer as Vocabulary, split_at_end as split_at_end  # noqa
