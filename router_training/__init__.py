"""The batch job that keeps the router right for the models in front of it.

collect → label → train → evaluate → promote. Its one product is a checkpoint folder; the router
service reads that and nothing else of this package.
"""
