"""A cluster of one's own: brought up here and over SSH, looked at, given jobs, taken down."""
