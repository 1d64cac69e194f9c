"""Training: one loop for text-to-image denoisers and autoencoders. It needs the extra ``train``.

``sfumato train --help`` and docs/training.md say how to use it; from Python it is ``train(TextToImage(settings), settings)``.
"""
