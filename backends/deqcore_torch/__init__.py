"""The torch backend of deqcore."""
