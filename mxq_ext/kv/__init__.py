"""The quantized KV cache: packed pages of keys and values, and attention that reads them."""
