"""Text on its way in and out: tokenizer, chat templates and the sandbox that renders them."""
