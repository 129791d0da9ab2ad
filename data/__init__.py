"""Records, readers with line-exact errors, tokenizers, DataModules and built-in generators."""
