"""How good a model is: perplexity on texts, benchmarks of lm-evaluation-harness, and code that is run in a sandbox."""
