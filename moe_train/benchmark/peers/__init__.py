"""Other people's layers and models. One file per peer; each imports its package only when it builds."""
