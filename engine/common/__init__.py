"""What every floor uses: files written whole, progress shown, provenance told."""
