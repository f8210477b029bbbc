#!/bin/bash
#
# Question: does the TUN device of wireguard-go report that its interface was set down?
#
# Why it matters: a program that stops sending, or takes its routes back, on EventDown never does so. The only event is one about
# the MTU, which has not changed. Such a program must watch the link itself.
#
# Seen with: golang.zx2c4.com/wireguard v0.0.0-20260522210424-ecfc5a8d5446, Linux 6.18. Explained by: tun/tun_linux.go has two
# sources of EventDown. routineNetlinkListener() needs wasEverUp, which is made anew (false) for each netlink message.
# routineHackListener() expects EIO from a write of no bytes; but CreateTUN opens the device with IFF_VNET_HDR, and tun_get_user()
# in drivers/net/tun.c then asks for the ten bytes of that header (EINVAL) long before it asks whether the interface is up.

. "$(dirname "$0")/lib.bash"
space host
[[ -c /dev/net/tun ]] || cannot "there is no /dev/net/tun"
go_program golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446 <<'GO'
package main

import (
	"fmt"
	"log"
	"os/exec"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/tun"
)

// collect returns the names of the events of the next four seconds.
func collect(device tun.Device) string {
	var names []string
	for end := time.After(4 * time.Second); ; {
		select {
		case event := <-device.Events():
			switch event {
			case tun.EventUp:
				names = append(names, "up")
			case tun.EventDown:
				names = append(names, "down")
			case tun.EventMTUUpdate:
				names = append(names, "mtu")
			}
		case <-end:
			return strings.Join(names, ",")
		}
	}
}

// set changes the administrative state of the interface.
func set(state string) {
	if out, err := exec.Command("ip", "link", "set", "tun0", state).CombinedOutput(); err != nil {
		log.Fatalf("%v: %s", err, out)
	}
}

func main() {
	device, err := tun.CreateTUN("tun0", 1420)
	if err != nil {
		log.Fatal(err)
	}
	collect(device)
	for _, state := range []string{"up", "down", "up"} {
		set(state)
		fmt.Printf("%s: %s; ", state, collect(device))
	}
	device.Close()
}
GO
seen=$(in_space "$host" "$work/program")
[[ $seen == "up: "*up*"; down: "* ]] || cannot "the device does not report that it is up: $seen"
if [[ $seen == *"; down: "*down*"; up: "* ]]; then down=reported; else down=missing; fi

report version "golang.zx2c4.com/wireguard v0.0.0-20260522210424-ecfc5a8d5446, Linux $(uname -r)"
report expected "EventDown within the second that the library takes between two looks at its device"
report seen "events within four seconds of each change of the interface: ${seen%; }"
conclude "down $down" "down missing"
