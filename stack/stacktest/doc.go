// Package stacktest is an app for tests of what stands behind a TUN: it needs no kernel and no privilege.
//
// An App has a gVisor stack of its own at the other end of a tuntest.Pipe. Its connections behave as those of a
// program on a Linux host would, down to the errno of a refused connect; frames can be injected that no program would
// send, and every frame that the stack under test writes can be looked at.
//
//	here, there := tuntest.Pipe(1500, tun.VnetHdr|tun.TSO|tun.USO)
//	s, err := stack.New(stack.Config{Device: here, …})
//	app, err := stacktest.New(there, netip.MustParseAddr("10.0.0.2"))
//	defer app.Close()
//	conn, err := app.DialTCP(ctx, netip.MustParseAddrPort("203.0.113.7:80"))
//
// The App is as strict as a kernel: a frame with a wrong checksum, length or offload header is dropped, and Close then
// returns an error that says what was wrong with it.
package stacktest
