"""A local file of text or conversations and a local tokenizer folder, turned into packed sequences. Imports no torch: the parent
checks files with it before ranks start."""
