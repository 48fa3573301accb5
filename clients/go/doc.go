// Package virtfleet is the client of virtfleet: a fleet's domains, storage and networks behind one endpoint.
//
//	client, err := virtfleet.Dial(ctx)
//	…
//	defer client.Close()
//	operation, err := client.Domains.StartDomain(ctx, &computev1.StartDomainRequest{Name: "nodes/n1/domains/web"})
//	…
//	domain, err := operation.Wait(ctx)
//	if errors.Is(err, virtfleet.ErrNodeMemoryShort) { … }
//
// [Dial] finds the fleet. [Services] has a client for each service of the API; calls through it carry a request_id where they change
// something, are repeated exactly where that is safe, and fail with an [*Error]. A mutation that touches a hypervisor returns an
// [*Operation]. Lists have iterators over all pages (AllDomains), watches have followers that resume by token (FollowResources);
// package virtfleet.dev/go/informer makes an indexed local copy of them.
//
// The messages are in packages of their own, one for each package of the API: virtfleet.dev/go/compute/v1 and so on.
package virtfleet
