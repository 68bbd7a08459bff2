"""What tests share: networks, models, data, helper processes."""
