package netns

import (
	"fmt"
	"syscall"
)

// User is the user as whom the program runs.
type User struct {
	UID, GID int
	Groups   []int // supplementary groups
}

// become makes this process that user. Only a process with all the rights of root can do so, and it then has no capabilities,
// unless the user is root.
func (u *User) become() error {
	if u == nil {
		return nil
	}
	if err := syscall.Setgroups(u.Groups); err != nil {
		return fmt.Errorf("cannot set the groups of user %d: %w", u.UID, err)
	}
	if err := syscall.Setgid(u.GID); err != nil {
		return fmt.Errorf("cannot set the group %d: %w", u.GID, err)
	}
	if err := syscall.Setuid(u.UID); err != nil {
		return fmt.Errorf("cannot become user %d: %w", u.UID, err)
	}
	return nil
}
