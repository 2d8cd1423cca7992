"""A user's dict becomes rows: checked, packed, sent to the device."""
