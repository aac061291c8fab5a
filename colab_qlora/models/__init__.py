"""Loading models and tokenizers, and attaching adapters to them."""
