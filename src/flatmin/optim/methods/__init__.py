"""The named methods: each a choice of pieces."""
