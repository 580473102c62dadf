"""Networks that others have trained, out of local files: what a spec says of them, and how they are built. Used by models/, evaluate/ and utility/."""
