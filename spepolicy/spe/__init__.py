"""SPE records and the packets that carry them: `records` says what a record holds, `packets` encodes and decodes."""
