// Package stacktest provides an app for tests of what is behind a TUN. It needs no kernel and no privilege.
//
// An App has its own gVisor stack at the other end of a tuntest.Pipe. Its connections behave like those of a program
// on a Linux host, down to the errno of a refused connect. Tests can inject frames that no program would send, and
// examine every frame that the stack under test writes.
//
//	here, there := tuntest.Pipe(1500, tun.VnetHdr|tun.TSO|tun.USO)
//	s, err := stack.New(stack.Config{Device: here, …})
//	app, err := stacktest.New(there, netip.MustParseAddr("10.0.0.2"))
//	defer app.Close()
//	conn, err := app.DialTCP(ctx, netip.MustParseAddrPort("203.0.113.7:80"))
//
// The App is as strict as a kernel: it drops a frame with a wrong checksum, length or offload header, and Close then
// returns an error that describes the fault.
package stacktest
