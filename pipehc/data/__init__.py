"""Training data: documents, tokens, and the samples of a step in an order that seed and step alone decide.

Begin with `batches.py`. May import everything below the trainer; Megatron's indexed data are read by
`pipehc.megatron.trainer.data`.
"""
