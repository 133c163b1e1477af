"""The numpy backend of deqcore."""
