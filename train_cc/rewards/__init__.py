"""What pulls the generator beside distribution matching: terms at its own samples x0 (docs/method.md)."""
