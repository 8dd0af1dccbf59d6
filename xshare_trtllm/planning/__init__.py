"""What XShare would gain elsewhere: model shapes, a cost model of a decode step, `xshare predict`."""
