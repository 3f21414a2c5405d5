"""What crosses a process boundary: messages, their codec, channels, the handshake, and the error tree.

Imports nothing of the project, so that the coordinator and the CLI stay free of torch.
"""
